"""The router: softmax over all experts, top-k, not renormalized; biases that recover; odds that merging keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.model.decoder import Decoder, moe
from flexmoe_jax.model.router import negative_part, route, route_uniform, router_logits
from tests.tiny import TINY, jit_forward, max_difference, random_params, random_tokens


def logits(N: int, E: int, seed: int = 0, scale: float = 2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal((N, E)), jnp.float32)


@settings(max_examples=40)
@given(E=st.sampled_from([1, 3, 8]), k=st.sampled_from([1, 2, 5, 9]), seed=st.integers(0, 99))
def test_weights_are_the_top_k_of_a_softmax_over_all_not_renormalized(E, k, seed):
    logits_NE = logits(6, E, seed)
    routing = route(logits_NE, k)
    weights, index = np.asarray(routing.weights_NE), np.asarray(routing.index_Nk)
    exponentials = np.exp(np.asarray(logits_NE, np.float64))
    probs = exponentials / exponentials.sum(-1, keepdims=True)
    assert index.shape == (6, min(k, E))  # clamped
    for n in range(6):
        best = set(np.argsort(-probs[n])[: min(k, E)])
        assert set(index[n]) == best == set(np.flatnonzero(weights[n]))
        # float32 rounding of a probability, whose size is at most 1
        assert abs(weights[n].sum() - probs[n, sorted(best)].sum()) < 1e-6
        assert np.abs(weights[n] - probs[n])[sorted(best)].max() < 1e-6
    if k < E:
        assert (weights.sum(-1) < 1).all()


def test_ties_go_to_the_first_expert():
    routing = route(jnp.zeros((3, 5)), 2)
    assert np.array_equal(routing.index_Nk, [[0, 1]] * 3)
    assert np.array_equal(np.asarray(routing.weights_NE) > 0, [[True, True, False, False, False]] * 3)


def test_top_k_above_the_number_of_experts_is_all_of_them():
    params, tokens = random_params(TINY, ("public", "news")), random_tokens(TINY, 2, 6)
    clamped = jit_forward(TINY, params, tokens, top_k=5).logits_BTV
    assert np.array_equal(clamped, jit_forward(TINY, params, tokens, top_k=None).logits_BTV)


def test_logits_are_products_plus_the_negative_part_of_the_bias():
    rng = np.random.default_rng(0)
    x, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (3, 8)))
    bias = np.array([0.7, -1.5, 0.0], np.float32)
    ours = router_logits(jnp.asarray(x), jnp.asarray(rows), jnp.asarray(bias))
    # eight float32 products of order 1
    assert max_difference(ours, x @ rows.T + np.array([0.0, -1.5, 0.0])) < 5e-6


def test_router_logits_of_bfloat16_activations_are_summed_in_float32():
    """The products (exact in float32) are added in float32, and the bias is not rounded."""
    x, rows = logits(5, 8).astype(jnp.bfloat16), logits(3, 8, 1).astype(jnp.bfloat16)
    bias = jnp.array([-0.1, -1.001, -3.3])
    ours = router_logits(x, rows.astype(jnp.float32), bias)
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T + np.asarray(bias, np.float64)
    assert ours.dtype == jnp.float32
    # rounding of float32 sums of order 10; bfloat16 would be off by 3e-2
    assert max_difference(ours, exact) < 1e-5


@pytest.mark.parametrize("bias", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("cotangent", [2.0, -2.0])
def test_the_negative_part_passes_every_cotangent(bias, cotangent):
    value, pull = jax.vjp(negative_part, jnp.float32(bias))
    assert value == min(bias, 0.0)
    assert pull(jnp.float32(cotangent)) == (cotangent,)


@given(start=st.floats(-3, 3, width=32), target=st.floats(-2, 2, width=32))
def test_descent_finds_the_best_allowed_bias_from_any_start(start, target):
    """Gradient descent on (min(b,0) - target)^2, projected to b <= 0 as a training step does, also from above zero."""
    final, effective = descend(jnp.float32(start), jnp.float32(target))
    # 200 steps of rate 0.05 shrink the distance, at most 5, by 0.9^200 = 7e-10.
    assert abs(float(final) - min(target, 0.0)) < 1e-6
    assert (np.asarray(effective) <= 0).all()


@jax.jit
def descend(bias, target):
    def step(bias, _):
        gradient = jax.grad(lambda b: (negative_part(b) - target) ** 2)(bias)
        return jnp.minimum(bias - 0.05 * gradient, 0.0), negative_part(bias)

    return jax.lax.scan(step, bias, length=200)


def test_a_positive_bias_recovers_in_the_model():
    """The biases of all layers start at +0.5, where min() has no slope; favoring `public` brings them below 0."""
    params, tokens = random_params(TINY, ("public", "news")), random_tokens(TINY, 2, 6)

    @jax.jit
    @jax.grad
    def slope(bias):
        experts = {**params["experts"], "news": {**params["experts"]["news"], "bias": bias}}
        out = jit_forward(TINY, {**params, "experts": experts}, tokens)
        return jax.nn.softmax(out.router_logits_LNE)[..., 1].mean()

    bias = jnp.full(TINY.num_layers, 0.5)
    for _ in range(20):
        bias = bias - slope(bias)
    assert (np.asarray(bias) < 0).all()


def test_pairwise_odds_are_kept_when_experts_join():
    """log(p_i / p_public) is what owner i trained, with any other experts; p_public itself shrinks."""
    x = logits(7, TINY.d_model, scale=1.0)
    names = ("public", "news", "code", "law", "math")
    experts = jax.tree.map(lambda leaf: leaf[0], random_params(TINY, names)["experts"])

    def log_probs(*members):
        rows, biases = (jnp.stack([experts[m][leaf] for m in members]) for leaf in ("router", "bias"))
        return np.log(np.asarray(route(router_logits(x, rows, biases), len(members)).weights_NE))

    pair, merged = log_probs("public", "news"), log_probs(*names)
    # float32 logarithms of order 5
    assert max_difference(merged[:, 1] - merged[:, 0], pair[:, 1] - pair[:, 0]) < 5e-6
    assert (merged[:, 0] < pair[:, 0]).all()


@pytest.mark.parametrize("E", [1, 3, 7])
def test_uniform_routing_gives_every_expert_the_same_weight(E):
    routing = route_uniform(logits(4, E))
    # softmax of equal logits: 1/E to one rounding
    assert max_difference(routing.weights_NE, np.full((4, E), 1 / E)) < 1e-7
    assert np.array_equal(routing.index_Nk, [list(range(E))] * 4)


def test_uniform_moe_is_the_mean_of_the_experts():
    names = ("public", "news", "code")
    experts = jax.tree.map(lambda leaf: leaf[0], random_params(TINY, names)["experts"])
    x = logits(6, TINY.d_model, scale=1.0)[None]
    alone = [moe(Decoder(TINY), {name: experts[name]}, x)[0] for name in names]
    # outputs of order 1 in float32
    assert max_difference(moe(Decoder(TINY, 1, uniform=True), experts, x)[0], sum(alone) / 3) < 1e-6
