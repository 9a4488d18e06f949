"""Dispatch: `dense` is the definition; `sparse` equals it in values and gradients, without an [E, N] array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.model import experts as experts_module
from flexmoe_jax.model.decoder import Decoder, moe
from flexmoe_jax.model.experts import FFN_WEIGHTS, dense, sparse
from flexmoe_jax.model.router import Routing, route
from tests.tiny import TINY, max_difference

D, F = 4, 6


def make_experts(E: int, seed: int = 0, router_scale: float = 1.0):
    """One layer's stacked experts; biases below 0 by more than any test's step."""
    rng = np.random.default_rng(seed)
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D), "router": (E, D)}
    stacked = {name: rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    stacked["router"] *= router_scale
    stacked["bias"] = (-0.2 - np.abs(rng.standard_normal(E))).astype(np.float32)
    return jax.tree.map(jnp.asarray, stacked)


def make_x(N: int, seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((1, N, D)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("k", "dispatch", "kernel", "tile"))
def value_and_gradients(x, experts, mix, *, k: int, dispatch: str, kernel: str = "_tiled", tile: int = 32):
    """MoE output, and gradients in x and every expert leaf of a random combination of it (plus the router logits)."""

    def loss(x, experts):
        y, logits_NE = moe(Decoder(TINY, k, dispatch), experts, x)
        return (y * mix).sum() + 0.1 * (logits_NE**2).sum(), y

    with pytest.MonkeyPatch.context() as patch:  # read while tracing; both are in the jit key
        patch.setattr(experts_module, "MIN_TILE_ROWS", tile)
        patch.setitem(experts_module.GROUPED, jax.default_backend(), getattr(experts_module, kernel))
        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, experts)
    return y, {"x": gradients[0], **gradients[1]}


ROUTINGS = ("random", "ties", "one takes all", "underflow")


def case_inputs(N: int, E: int, routing: str, seed: int):
    """`ties`: equal logits; `one takes all`: others far below; `underflow`: the weight of others is exactly 0."""
    experts = make_experts(E, seed, router_scale=1.0 if routing == "random" else 0.0)
    favorite = seed % E
    bias = {"random": experts["bias"], "ties": jnp.zeros(E)}.get(routing)
    if bias is None:
        bias = jnp.full(E, -9.0 if routing == "one takes all" else -300.0).at[favorite].set(-0.5)
    mix = np.random.default_rng(seed + 7).standard_normal((1, N, D)).astype(np.float32)
    return make_x(N, seed + 3), {**experts, "bias": bias}, jnp.asarray(mix)


@settings(max_examples=6)  # in addition to the examples; each one compiles twice
@given(
    shape=st.tuples(st.sampled_from([1, 5, 37, 130]), st.integers(1, 12)).flatmap(
        lambda NE: st.tuples(st.just(NE[0]), st.just(NE[1]), st.integers(1, NE[1]))
    ),
    tile=st.sampled_from([8, 32]),
    seed=st.integers(0, 9),
)
@example(shape=(130, 12, 2), tile=32, seed=0)  # more slots than a tile, and not a multiple of it
@example(shape=(37, 5, 5), tile=8, seed=0)  # k = E
@example(shape=(130, 2, 1), tile=8, seed=1)  # many tiles of one expert
@example(shape=(3, 12, 2), tile=32, seed=2)  # more experts than slots: most are empty
@example(shape=(1, 1, 1), tile=32, seed=0)
def test_sparse_equals_dense_in_values_and_gradients(shape, tile, seed):
    check_against_dense(shape, "_tiled", tile, seed)


@pytest.mark.parametrize("shape", [(37, 5, 2), (3, 12, 2), (7, 3, 3)])
def test_the_kernel_of_accelerators_equals_dense_in_values_and_gradients(shape):
    check_against_dense(shape, "_ragged", 32, 0)


def check_against_dense(shape, kernel, tile, seed):
    N, E, k = shape
    for routing in ROUTINGS:  # one compilation serves all four
        inputs = case_inputs(N, E, routing, seed)
        y, gradients = value_and_gradients(*inputs, k=k, dispatch="sparse", kernel=kernel, tile=tile)
        y_dense, gradients_dense = value_and_gradients(*inputs, k=k, dispatch="dense")
        # The same float32 sums in another order: relative to the largest entry, a few dozen roundings of 6e-8.
        assert max_difference(y, y_dense) < 3e-6 * max(1.0, float(jnp.abs(y_dense).max())), routing
        assert set(gradients) == {"x", "w_gate", "w_up", "w_down", "router", "bias"}
        for name, ours in gradients.items():
            size = max(1.0, float(jnp.abs(gradients_dense[name]).max()))
            assert max_difference(ours, gradients_dense[name]) < 5e-6 * size, (routing, name)


def test_gradients_equal_finite_differences():
    """The derivative of `dense` is that of the formula (in float32: a central difference of 1e-2)."""
    x, experts, mix = case_inputs(5, 3, "random", 4)
    _, gradients = value_and_gradients(x, experts, mix, k=3, dispatch="dense")

    @jax.jit
    def loss(x, experts):
        y, logits_NE = moe(Decoder(TINY, 3), experts, x)
        return (y * mix).sum() + 0.1 * (logits_NE**2).sum()

    rng = np.random.default_rng(0)
    for name in ("x", "w_gate", "w_up", "w_down", "router", "bias"):
        value = x if name == "x" else experts[name]
        step = 1e-2 * jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
        at = [
            loss(value + s * step, experts) if name == "x" else loss(x, {**experts, name: value + s * step})
            for s in (1.0, -1.0)
        ]
        slope = float((gradients[name] * step).sum())
        # Third-order remainder of the difference (1e-6 relative to 1e-2 steps) and float32 rounding of a loss near 10.
        assert abs(float(at[0] - at[1]) / 2 - slope) < 1e-2 * abs(slope) + 3e-5, name


def test_dense_equals_the_weighted_sum_in_float64():
    x, experts, _ = case_inputs(9, 4, "random", 0)
    ours, logits_NE = moe(Decoder(TINY, 2), experts, x)
    weights = np.asarray(route(logits_NE, 2).weights_NE, np.float64)
    x64, w = np.asarray(x[0], np.float64), {name: np.asarray(value, np.float64) for name, value in experts.items()}
    expected = np.zeros((9, D))
    for e in range(4):
        gate, up = x64 @ w["w_gate"][e], x64 @ w["w_up"][e]
        expected += weights[:, [e]] * ((gate / (1 + np.exp(-gate)) * up) @ w["w_down"][e])
    assert max_difference(ours[0], expected) < 2e-6  # float32 against float64, values of order 1


def test_named_experts_equal_stacked_experts():
    """An expert's position is that of its name in canonical order, in any order of the mapping."""
    stacked, x = make_experts(4), make_x(21)
    names = ("public", "code", "law", "news")
    rows = reversed([*enumerate(names)])
    named = {name: {leaf: value[i] for leaf, value in stacked.items()} for i, name in rows}
    for k in (2, 4):
        y_named, logits_named = jax.jit(functools.partial(moe, Decoder(TINY, k)))(named, x)
        y_stacked, logits_stacked = jax.jit(functools.partial(moe, Decoder(TINY, k)))(stacked, x)
        assert np.array_equal(logits_named, logits_stacked)
        # Unrolled against scanned: XLA may fuse the same sums differently, one rounding of values of order 1.
        assert max_difference(y_named, y_stacked) < 1e-6


@pytest.mark.parametrize("dispatch", [dense, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("chosen", ["top-2 of 3", "weight underflowed to 0"])
def test_nan_in_an_expert_of_weight_zero_cannot_reach_the_output(dispatch, chosen):
    poisoned = {name: value.at[1].set(jnp.nan) for name, value in make_experts(3).items()}
    healthy = {name: value.at[1].set(0) for name, value in poisoned.items()}
    x = make_x(11)[0]
    logits_NE = jnp.asarray(np.random.default_rng(0).standard_normal((11, 3)), jnp.float32).at[:, 1].set(-300.0)
    routing = route(logits_NE, 2 if chosen == "top-2 of 3" else 3)
    assert (np.asarray(routing.weights_NE)[:, 1] == 0).all()
    y = jax.jit(dispatch)(x, routing, poisoned)
    assert np.isfinite(y).all()
    assert np.array_equal(y, jax.jit(dispatch)(x, routing, healthy))


def test_sparse_keeps_nan_out_of_the_other_experts_gradients():
    poisoned = {name: value.at[1].set(jnp.nan) for name, value in make_experts(3).items()}
    logits_NE = jnp.asarray(np.random.default_rng(0).standard_normal((11, 3)), jnp.float32).at[:, 1].set(-300.0)
    routing = route(logits_NE, 2)
    dx = jax.jit(jax.grad(lambda x: sparse(x, routing, poisoned).sum()))(make_x(11)[0])
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("dispatch", [dense, sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("chosen", ["top-2 of 3", "weight underflowed to 0"])
@pytest.mark.parametrize("poison", ["NaN weights", "projections overflow"])
def test_an_expert_of_weight_zero_that_is_not_finite_reaches_no_gradient(dispatch, chosen, poison):
    """The gradients are those with a healthy expert in its place.

    Projections overflow only in tokens for which expert 1 has weight 0: its own gradients are finite, too.
    """
    healthy, x, mix = {name: make_experts(3)[name] for name in FFN_WEIGHTS}, make_x(40)[0], make_x(40, seed=2)[0]
    logits_NE = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    logits_NE[:, 1] = -300
    if poison == "NaN weights":
        bad = {name: value.at[1].set(jnp.nan) for name, value in healthy.items()}
    else:  # by the first number of a token, which other experts do not read
        logits_NE[::4, 1] = 0
        x = x.at[:, 0].set(jnp.where(jnp.arange(40) % 4 == 0, 0, 1e30))
        healthy = {n: healthy[n] if n == "w_down" else healthy[n].at[:, 0].set(0) for n in FFN_WEIGHTS}
        bad = {n: healthy[n] if n == "w_down" else healthy[n].at[1, 0].set(1e30) for n in FFN_WEIGHTS}
    routing = route(jnp.asarray(logits_NE), 2 if chosen == "top-2 of 3" else 3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(x, weights_NE, experts):
        return (dispatch(x, Routing(weights_NE, routing.index_Nk), experts) * mix).sum()

    ours, usual = (gradients(x, routing.weights_NE, experts) for experts in (bad, healthy))
    for path, leaf in jax.tree.leaves_with_path(ours):
        assert np.isfinite(leaf).all(), path
    np.testing.assert_array_equal(ours[0][:, 1:], usual[0][:, 1:])
    np.testing.assert_array_equal(ours[1], usual[1])
    for name in FFN_WEIGHTS:
        np.testing.assert_array_equal(ours[2][name][::2], usual[2][name][::2], err_msg=name)


@pytest.mark.parametrize("kernel", ["_tiled", "_ragged"])
@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_reading_one_layer_of_all_weights_equals_slicing_it_first(monkeypatch, dispatch, kernel):
    """Decoding reads weights in this form: bit-identical to the sliced form."""
    monkeypatch.setitem(experts_module.GROUPED, jax.default_backend(), getattr(experts_module, kernel))
    layers = [make_experts(5, seed) for seed in (0, 1, 2)]
    whole = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    x = make_x(7)
    run = jax.jit(functools.partial(moe, Decoder(TINY, 2, dispatch)))
    alone, _ = run(layers[1], x)
    mixed = {**whole, "router": layers[1]["router"], "bias": layers[1]["bias"]}
    y, _ = run(mixed, x, layer=jnp.int32(1))
    assert np.array_equal(y, alone)


def test_sparse_refuses_named_experts():
    stacked = make_experts(2)
    named = {"public": {n: v[0] for n, v in stacked.items()}, "news": {n: v[1] for n, v in stacked.items()}}
    with pytest.raises(FlexMoEError, match=r"sparse dispatch was given named experts(.|\n)*stack them once"):
        moe(Decoder(TINY, 1, "sparse"), named, make_x(3))


def test_the_gradient_of_sparse_has_no_array_of_tokens_times_experts():
    """No array in the derivative of `sparse` is as large as [E, N, min(D, F)]; that of `dense` has one."""
    N, E, k = 256, 12, 2
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    experts = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, weights, index = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((N, D), jnp.float32), ((N, E), jnp.float32), ((N, k), jnp.int32))
    )

    def largest(dispatch):
        def loss(x, weights_NE, index_Nk, experts):
            return dispatch(x, Routing(weights_NE, index_Nk), experts).sum()

        gradient = jax.grad(loss, argnums=(0, 1, 3), allow_int=True)
        return max(v.size for v in _arrays(jax.make_jaxpr(gradient)(x, weights, index, experts).jaxpr))

    bound = N * E * min(D, F)
    assert largest(sparse) < bound <= largest(dense)


def _arrays(jaxpr):
    """Every intermediate array of a jaxpr and of the jaxprs inside its equations (loop bodies, jitted calls)."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _arrays(inner)
