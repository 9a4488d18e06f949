"""Every parameter, declared once: its shape, its initial values, and the mesh axes that split it.

An owner's expert holds each matrix W of its feed-forward network whole, or as a low-rank change of the public expert's:
W = W_public + A B, with A [in, r] and B [r, out] (Hu et al., LoRA, arXiv 2106.09685). It may hold such a change of the
output head, too, which has no layers, with a bias for every token.

Legend: L layers, D width, H query heads, G key/value heads, K head size, F feed-forward width, V vocabulary, E experts.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import PUBLIC, TRUNK

# The axes of the device mesh (see parallel/mesh.py).
AXES = DATA, FSDP, EXPERT, TENSOR = ("data", "fsdp", "expert", "tensor")
Axes = tuple[str | None, ...]

FFN_WEIGHTS = ("w_gate", "w_up", "w_down")
HEAD = "head"
HEAD_LEAVES = ("head_a", "head_b", "head_bias")
NO_RANKS: Mapping[str, int] = {}  # every matrix is held whole


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape, mesh axes, and initial values: normal with standard deviation `std`, or the constant `value` if that is 0.

    `axes` holds the mesh axis that splits each dimension, or None; empty: every device holds the whole leaf.
    """

    shape: tuple[int, ...]
    axes: Axes = ()
    std: float = 0.0
    value: float = 0.0


def owner_leaves(config: ModelConfig, owner: str, ranks: Mapping[str, int] = NO_RANKS) -> dict[str, Leaf]:
    """{path inside the owner's subtree: Leaf} of `trunk`, or of the expert of any other name.

    `ranks` {matrix: r} are of those that the expert holds as a change of rank r.
    """
    return _trunk_leaves(config) if owner == TRUNK else _expert_leaves(config, ranks)


def factors(matrix: str) -> tuple[str, str]:
    """The names of the leaves A and B of a low-rank change of `matrix`."""
    return f"{matrix}_a", f"{matrix}_b"


def ranks_of(leaves: Mapping[str, Any]) -> dict[str, int]:
    """{matrix: rank} of the low-rank changes among the leaves of an expert; all that is read of a leaf is `shape`."""
    return {name: rank for name, rank in all_ranks(leaves).items() if name in FFN_WEIGHTS}


def all_ranks(leaves: Mapping[str, Any]) -> dict[str, int]:
    """`ranks_of`, and that of the change of the output head."""
    first = {name: leaves[a].shape for name in (*FFN_WEIGHTS, HEAD) for a, _ in [factors(name)] if a in leaves}
    return {name: shape[-1] for name, shape in first.items() if shape}


def read_ranks(text: str, config: ModelConfig) -> dict[str, int]:
    """The ranks that `16` (of all three matrices) or `w_gate=8,w_up=8,head=32` says; a matrix left out is whole.

    The output head is changed only if it is named.

    ConfigError for anything else, and for ranks that no matrix of this configuration has.
    """
    named = text if "=" in text else ",".join(f"{name}={text}" for name in FFN_WEIGHTS)
    ranks, most = {}, min(config.d_model, config.d_ff)
    for part in named.split(","):
        name, _, rank = (word.strip() for word in part.partition("="))
        if name not in (*FFN_WEIGHTS, HEAD) or name in ranks or not rank.isdecimal() or not 1 <= int(rank) <= most:
            sizes = f"matrices of {config.d_model} x {config.d_ff}"
            remedy = f"give a rank from 1 to {most}, as 16, or one for each matrix, as w_gate=8,w_up=8,w_down=32,head=8"
            raise ConfigError(f"the rank is {text!r}, for {sizes}: {part.strip()!r} is none", remedy)
        ranks[name] = int(rank)
    return ranks


def model_leaves(
    config: ModelConfig, experts: tuple[str, ...] = (PUBLIC,), ranks: Mapping[str, Mapping[str, int]] = {}
) -> dict[str, Leaf]:
    """{path in the whole tree: Leaf} of a model of the trunk and the named experts; `ranks` {owner: its ranks}."""
    leaves = {f"trunk/{path}": leaf for path, leaf in owner_leaves(config, TRUNK).items()}
    for name in experts:
        own = owner_leaves(config, name, ranks.get(name, NO_RANKS))
        leaves |= {f"experts/{name}/{path}": leaf for path, leaf in own.items()}
    return leaves


def count_parameters(config: ModelConfig, owner: str) -> int:
    """The number of parameters in one owner's subtree (`trunk`, or any expert)."""
    return sum(math.prod(leaf.shape) for leaf in owner_leaves(config, owner).values())


def is_matrix(path: str) -> bool:
    """Whether the leaf at `path` is a weight matrix of a block; these are multiplied in the compute dtype."""
    return path.rpartition("/")[2].startswith("w_")


def is_float32(path: str) -> bool:
    """Whether the leaf at `path` enters only float32 operations, whatever the compute dtype: norms, rows, biases."""
    return path.endswith(("norm", "router", "bias"))


# Normal(0, 0.02) everywhere, as in OLMo-2 (OLMo-core `InitMethod.normal`); norms are initially one.
_STD = 0.02


def _trunk_leaves(c: ModelConfig) -> dict[str, Leaf]:
    L, D, H, G, K, V = c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size
    leaves = {
        "embed": Leaf((V, D), (TENSOR, FSDP), std=_STD),
        "blocks/w_q": Leaf((L, D, H, K), (None, FSDP, TENSOR, None), std=_STD),
        "blocks/w_k": Leaf((L, D, G, K), (None, FSDP, TENSOR, None), std=_STD),
        "blocks/w_v": Leaf((L, D, G, K), (None, FSDP, TENSOR, None), std=_STD),
        "blocks/w_o": Leaf((L, H, K, D), (None, TENSOR, None, FSDP), std=_STD),
        "blocks/attn_norm": Leaf((L, D), value=1.0),
        "blocks/ffn_norm": Leaf((L, D), value=1.0),
        "final_norm": Leaf((D,), value=1.0),
    }
    if c.qk_norm:
        q, k = (K, K) if c.qk_norm_per_head else (H * K, G * K)
        leaves |= {"blocks/q_norm": Leaf((L, q), value=1.0), "blocks/k_norm": Leaf((L, k), value=1.0)}
    if c.qkv_bias:
        leaves |= {f"blocks/b_{name}": Leaf((L, heads, K)) for name, heads in (("q", H), ("k", G), ("v", G))}
    if not c.tie_embeddings:
        leaves["head"] = Leaf((D, V), (FSDP, TENSOR), std=_STD)
    return leaves


def _expert_leaves(c: ModelConfig, ranks: Mapping[str, int] = NO_RANKS) -> dict[str, Leaf]:
    L, D, F = c.num_layers, c.d_model, c.d_ff
    leaves = {
        "w_gate": Leaf((L, D, F), (None, FSDP, TENSOR), std=_STD),
        "w_up": Leaf((L, D, F), (None, FSDP, TENSOR), std=_STD),
        "w_down": Leaf((L, F, D), (None, TENSOR, FSDP), std=_STD),
        "router": Leaf((L, D), std=_STD),
        "bias": Leaf((L,)),
    }
    if HEAD in ranks:
        rank, V = ranks[HEAD], c.vocab_size
        leaves["head_a"] = Leaf((D, rank), (None, None), std=D**-0.5)
        leaves["head_b"] = Leaf((rank, V), (None, TENSOR))  # 0, like the other B, and the bias
        leaves["head_bias"] = Leaf((V,), (TENSOR,))
    for name, rank in ranks.items():
        if name == HEAD:
            continue
        (_, inputs, outputs), (_, split_in, split_out) = leaves[name].shape, leaves.pop(name).axes
        a, b = factors(name)
        # B is 0: the change begins at 0, and with it the expert as the public one, bit for bit.
        leaves[a] = Leaf((L, inputs, rank), (None, split_in, None), std=inputs**-0.5)
        leaves[b] = Leaf((L, rank, outputs), (None, None, split_out))
    return leaves


# The axes do not depend on sizes. This configuration has every leaf that a model can have.
_ANY = ModelConfig(1, 1, 2, 1, 1, 2, 1, 1, qkv_bias=True)
TRUNK_AXES: dict[str, Axes] = {path: leaf.axes for path, leaf in _trunk_leaves(_ANY).items()}
EXPERT_AXES: dict[str, Axes] = {
    path: leaf.axes
    for ranks in (NO_RANKS, dict.fromkeys((*FFN_WEIGHTS, HEAD), 1))
    for path, leaf in _expert_leaves(_ANY, ranks).items()
}
# For experts stacked [L, E, ...] (parallel/stacked.py), which are whole: `expert` splits the second dimension.
STACKED_AXES: dict[str, Axes] = {
    path: (leaf.axes[0], EXPERT, *leaf.axes[1:]) for path, leaf in _expert_leaves(_ANY).items() if leaf.axes
}
