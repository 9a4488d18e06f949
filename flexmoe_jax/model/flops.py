"""Floating-point operations that a pass needs, by the products of its matrices: two for each multiply-add."""

from collections.abc import Mapping

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.params import count_parameters
from flexmoe_jax.tree import TRUNK


def products(model: ModelConfig, T: int) -> dict[str, float]:
    """Forward operations per token in rows of T tokens: `head`, `attention` weights, causal `scores`, one `expert`.

    Norms, router and softmax are left out; they are below 1% at every size of interest.
    """
    lookup = model.vocab_size * model.d_model
    expert = count_parameters(model, "x") - model.num_layers * (model.d_model + 1)
    matrices = 1 if model.tie_embeddings else 2
    return {
        "head": 2.0 * lookup,
        "attention": 2.0 * (count_parameters(model, TRUNK) - matrices * lookup),
        "scores": 2.0 * T * model.num_heads * model.head_dim * model.num_layers,  # two products over half the square
        "expert": 2.0 * expert,
    }


def forward_flops(model: ModelConfig, T: int, active: float = 1) -> float:
    """Of one token's forward pass with `active` experts."""
    p = products(model, T)
    return p["head"] + p["attention"] + p["scores"] + active * p["expert"]


def step_flops(model: ModelConfig, T: int, active: float, trained: Mapping[str, float]) -> float:
    """Of one token's training step: forward, activations' derivatives everywhere, weights' where they are `trained`.

    `trained` says how much of each product's weights: of `head` and `attention` a share, of `expert` a number of
    experts, of the `active` ones. Nothing that is computed again (remat) counts, nor does the update.
    """
    p = products(model, T)
    weights = sum(share * p[name] for name, share in trained.items())
    return 2 * forward_flops(model, T, active) + p["scores"] + weights


def training_flops(model: ModelConfig, T: int, kind: str, active: int = 1) -> float:
    """Of one token's training step: `joint` trains everything with `active` experts a token.

    `expert` is an owner's step beside the frozen public model: activations' derivatives everywhere, weights' in one
    expert alone. `alone` is the same without the public expert.
    """
    if kind == "joint":
        return step_flops(model, T, active, {"head": 1, "attention": 1, "expert": active})
    return step_flops(model, T, 2 if kind == "expert" else 1, {"expert": 1})
