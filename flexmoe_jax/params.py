"""Every parameter, declared once: its shape and how it begins. Initialisation and checks derive from it."""

import dataclasses
import math

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.tree import PUBLIC, TRUNK


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Shape, and the initial distribution: normal with standard deviation `std`, or the constant `value`."""

    shape: tuple[int, ...]
    std: float = 0.0
    value: float = 0.0


def owner_spec(config: ModelConfig, owner: str) -> dict[str, LeafSpec]:
    """{path inside the owner's subtree: LeafSpec} for `trunk` or any expert."""
    return _trunk_spec(config) if owner == TRUNK else _expert_spec(config)


def model_spec(config: ModelConfig, experts: tuple[str, ...] = (PUBLIC,)) -> dict[str, LeafSpec]:
    """{path in the whole tree: LeafSpec} for a model of the trunk and the named experts."""
    spec = {f"trunk/{path}": leaf for path, leaf in owner_spec(config, TRUNK).items()}
    for name in experts:
        spec |= {f"experts/{name}/{path}": leaf for path, leaf in owner_spec(config, name).items()}
    return spec


def count_parameters(config: ModelConfig, owner: str) -> int:
    """Parameters in one owner's subtree."""
    return sum(math.prod(leaf.shape) for leaf in owner_spec(config, owner).values())


# Normal(0, 0.02) everywhere, as OLMo-2 begins (OLMo-core `InitMethod.normal`); norms begin at one.
_STD = 0.02


def _trunk_spec(c: ModelConfig) -> dict[str, LeafSpec]:
    L, D, H, G, K, V = c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size
    spec = {
        "embed": LeafSpec((V, D), std=_STD),
        "blocks/w_q": LeafSpec((L, D, H, K), std=_STD),
        "blocks/w_k": LeafSpec((L, D, G, K), std=_STD),
        "blocks/w_v": LeafSpec((L, D, G, K), std=_STD),
        "blocks/w_o": LeafSpec((L, H, K, D), std=_STD),
        "blocks/attn_norm": LeafSpec((L, D), value=1.0),
        "blocks/ffn_norm": LeafSpec((L, D), value=1.0),
        "final_norm": LeafSpec((D,), value=1.0),
    }
    if c.qk_norm:
        spec |= {"blocks/q_norm": LeafSpec((L, H * K), value=1.0), "blocks/k_norm": LeafSpec((L, G * K), value=1.0)}
    if not c.tie_embeddings:
        spec["head"] = LeafSpec((D, V), std=_STD)
    return spec


def _expert_spec(c: ModelConfig) -> dict[str, LeafSpec]:
    L, D, F = c.num_layers, c.d_model, c.d_ff
    return {
        "w_gate": LeafSpec((L, D, F), std=_STD),
        "w_up": LeafSpec((L, D, F), std=_STD),
        "w_down": LeafSpec((L, F, D), std=_STD),
        "router": LeafSpec((L, D), std=_STD),
        "bias": LeafSpec((L,)),
    }
