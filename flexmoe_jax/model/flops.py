"""Floating-point operations of forward passes and training steps: the matrix products, two per multiply-add."""

from collections.abc import Mapping

from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import NO_RANKS, count_parameters
from flexmoe_jax.tree import TRUNK


def products(model: ModelConfig, T: int) -> dict[str, float]:
    """Forward FLOPs per token in rows of T tokens: `head`, `attention` weights, causal `scores`, one `expert`.

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
    """FLOPs of one token's forward pass with `active` experts, in rows of T tokens."""
    p = products(model, T)
    return p["head"] + p["attention"] + p["scores"] + active * p["expert"]


def step_flops(model: ModelConfig, T: int, active: float, trained: Mapping[str, float]) -> float:
    """FLOPs of one token's training step: forward, derivatives of all activations, and of the `trained` weights.

    `trained` is the share of the weights of `head` and of `attention`, and for `expert` the number of the `active`
    experts. Recomputation (remat) and the optimizer's update do not count.
    """
    p = products(model, T)
    weights = sum(share * p[name] for name, share in trained.items())
    return 2 * forward_flops(model, T, active) + p["scores"] + weights


def training_flops(
    model: ModelConfig, T: int, kind: str, active: int = 1, ranks: Mapping[str, int] = NO_RANKS
) -> float:
    """FLOPs of one token's training step. `kind` "joint" trains everything with `active` experts per token.

    "expert" is an owner's step beside the frozen public model: derivatives of all activations, and of the weights of
    one expert, or of its low-rank changes, each of which takes two products. "alone" is the same without the public
    expert.
    """
    if kind == "joint":
        return step_flops(model, T, active, {"head": 1, "attention": 1, "expert": active})
    low = sum(2 * rank * (model.d_model + model.d_ff) for rank in ranks.values())
    share = (3 - len(ranks)) / 3 + low / (3 * model.d_model * model.d_ff)
    return step_flops(model, T, 2 if kind == "expert" else 1, {"expert": share})
