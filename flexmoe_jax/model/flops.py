"""Floating-point operations that a pass needs, by the products of its matrices: two for each multiply-add."""

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.model.spec import count_parameters
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


def forward_flops(model: ModelConfig, T: int, active: int = 1) -> float:
    """Of one token's forward pass with `active` experts."""
    p = products(model, T)
    return p["head"] + p["attention"] + p["scores"] + active * p["expert"]


def training_flops(model: ModelConfig, T: int, kind: str, active: int = 1) -> float:
    """Of one token's training step: `joint` trains everything with `active` experts a token.

    `expert` is an owner's step beside the frozen public model: activations' derivatives everywhere, weights' in one
    expert alone. `alone` is the same without the public expert.
    """
    p = products(model, T)
    if kind == "joint":
        return 3 * forward_flops(model, T, active)
    experts = 2 if kind == "expert" else 1
    return 2 * (p["head"] + p["attention"] + experts * p["expert"]) + 3 * p["scores"] + p["expert"]
