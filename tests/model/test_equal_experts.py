"""Experts that are copies of one another are the dense model, whatever the router says: no anchor loses its function.

A mixture beside a public model starts from copies of its feed-forward network. If the weights of a token's active
experts do not add up to 1 and nothing undoes the factor, such a mixture is another model than the one it is made from.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.router import route
from flexmoe_jax.model_config import ModelConfig, RopeScaling
from tests.tiny import TINY, jit_forward, max_difference, random_params, random_tokens, stacked

change = functools.partial(dataclasses.replace, TINY, pre_norm=True, norm_topk=True)
ANCHORS = {
    "olmo2": TINY,
    "olmo2-renormalized": dataclasses.replace(TINY, norm_topk=True),
    "llama": change(qk_norm=False, rope_scaling=RopeScaling("llama3", 8.0, 8)),
    "qwen2": change(qk_norm=False, qkv_bias=True),
    "qwen3": change(qk_norm_per_head=True),
    "smollm3": change(qk_norm=False, rope_skip=2, tie_embeddings=True),
}
FORMS = {"named-dense": (False, "dense"), "stacked-dense": (True, "dense"), "stacked-sparse": (True, "sparse")}


def copies(config: ModelConfig, experts: int):
    """(dense, mixture): the same feed-forward network once, and `experts` times with random router rows and biases."""
    names = ("public", *(f"owner-{i}" for i in range(1, experts)))
    params = random_params(config, names)
    ffn = {name: leaf for name, leaf in params["experts"]["public"].items() if name.startswith("w_")}
    mixture = {name: {**params["experts"][name], **ffn} for name in names}
    trunk = params["trunk"]
    return {"trunk": trunk, "experts": {"public": mixture["public"]}}, {"trunk": trunk, "experts": mixture}


@pytest.mark.parametrize(
    ("form", "experts", "top_k", "dtype"),
    [
        ("named-dense", 2, 1, "float32"),
        ("named-dense", 3, None, "bfloat16"),
        ("stacked-dense", 4, 2, "bfloat16"),
        ("stacked-sparse", 8, 2, "float32"),
        ("stacked-sparse", 8, 5, "bfloat16"),
    ],
)
@pytest.mark.parametrize("config", ANCHORS.values(), ids=ANCHORS.keys())
def test_copies_of_the_public_expert_are_the_public_model(config, form, experts, top_k, dtype):
    is_stacked, dispatch = FORMS[form]
    dense, mixture = copies(config, experts)
    tokens = random_tokens(config, 2, 9)
    expected = jit_forward(config, dense, tokens, dtype=dtype).logits_BTV
    mixture = stacked(mixture) if is_stacked else mixture
    found = jit_forward(config, mixture, tokens, top_k=top_k, dispatch=dispatch, dtype=dtype).logits_BTV
    # The weighted sum of at most 8 equal terms is rounded 8 times, in float32 by 6e-8 and in bfloat16 by 4e-3 relative
    # to its size; logits have the standard deviation that is checked here. OLMo-2 divides by the root of the mean
    # square plus norm_eps, so that a factor below 1 changes its output a little.
    assert np.std(expected) > 0.3
    assert max_difference(found, expected) < (2e-4 if dtype == "float32" else 0.1) * np.std(expected)


def test_without_renormalization_the_function_is_lost():
    """The property above can fail: `route` without `norm_topk` loses most of the weight."""
    weights = route(jnp.zeros((1, 8)), 2).weights_NE
    assert float(weights.sum()) == pytest.approx(0.25)
    assert float(route(jnp.zeros((1, 8)), 2, norm_topk=True).weights_NE.sum()) == pytest.approx(1.0)


def test_renormalized_weights_keep_the_odds_of_the_chosen_experts():
    logits_NE = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32)
    plain, renormalized = route(logits_NE, 3), route(logits_NE, 3, norm_topk=True)
    assert np.array_equal(plain.index_Nk, renormalized.index_Nk)
    expected = plain.weights_NE / plain.weights_NE.sum(-1, keepdims=True)
    assert max_difference(renormalized.weights_NE, expected) < 1e-6  # float32 rounding of numbers up to 1


def test_a_pre_norm_model_without_renormalization_is_refused():
    with pytest.raises(ConfigError, match=r"norm_topk is False and model.pre_norm is True(.|\n)*imported or trained"):
        dataclasses.replace(TINY, pre_norm=True)


def test_the_derivative_of_renormalized_weights_is_that_of_the_formula():
    logits_NE = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)), jnp.float32)
    mix = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4)), jnp.float32)

    def formula(logits):
        weights = route(logits, 2).weights_NE
        return (mix * weights / weights.sum(-1, keepdims=True)).sum()

    ours = jax.grad(lambda logits: (mix * route(logits, 2, norm_topk=True).weights_NE).sum())(logits_NE)
    assert max_difference(ours, jax.grad(formula)(logits_NE)) < 1e-6  # float32 rounding of numbers of order 0.1
