"""The bytes that optimizers keep per parameter, and that they train with them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError, FlexMoEError
from flexmoe_jax.optimizer_config import SCHEDULES, Group, OptimizerConfig
from flexmoe_jax.parallel.stacked import StackedLeaf, stack_weights, unstack_weights
from flexmoe_jax.params import model_leaves
from flexmoe_jax.training.optimizer import factors_of, group_table, learning_rate, make_optimizer
from flexmoe_jax.tree import PUBLIC, flatten, unflatten
from tests.tiny import MODEL

L, D, F = 3, 128, 256
PARAMS = {"w_up": jnp.zeros((L, D, F)), "bias": jnp.zeros(L)}
FACTORED = {"second_moment": "factored"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8),
        ({"first_moment": "bfloat16"}, 6),
        (FACTORED, 4),
        (FACTORED | {"first_moment": "bfloat16"}, 2),
        (FACTORED | {"b1": 0.0}, 0),
    ],
)
def test_moments_take_the_stated_bytes_per_parameter(changes, expected):
    """In addition only means of rows and columns, the moments of biases, and counters: 4 bytes each."""
    state = make_optimizer(OptimizerConfig(**changes), 10).init(PARAMS)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    small = 4 * (L * (D + F) + 3 * L + 10)
    assert 0 <= size - expected * L * D * F <= small


def test_updates_equal_adamw_written_by_hand():
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64, of gradients clipped to norm 3.

    Five steps, of which the second and fourth are clipped; every number of the configuration differs from its default.
    Tolerance: float32 moments.
    """
    config = OptimizerConfig(
        lr=0.1, warmup_steps=0, end_lr_fraction=1.0, b1=0.7, b2=0.9, eps=0.05, weight_decay=0.5, clip_norm=3.0
    )
    optimizer, rng = make_optimizer(config, 5), np.random.default_rng(0)
    w = rng.normal(size=(2, 3, 4))
    params = {"w_up": jnp.asarray(w, jnp.float32)}
    state = optimizer.init(params)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 6):
        g = rng.normal(size=w.shape)
        g *= (1.0 if t % 2 else 30.0) / np.linalg.norm(g)
        updates, state = optimizer.update({"w_up": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g *= min(1.0, 3.0 / np.linalg.norm(g))
        m, v = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.7**t) / (np.sqrt(v / (1 - 0.9**t)) + 0.05) + 0.5 * w)
        np.testing.assert_allclose(params["w_up"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, FACTORED])
def test_a_huge_gradient_moves_as_far_as_the_clipped_one(changes):
    """The second of two steps: AdamW's first step has the same length for any gradient. Tolerance: float32."""
    config = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1.0, **changes)
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(L, D, F)).astype(np.float32) for _ in range(2))
    second /= np.linalg.norm(second)
    moved = []
    for scale in (1.0, 1e4):
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(PARAMS)
        for gradient in (first, scale * second):
            grads = {"w_up": jnp.asarray(gradient), "bias": jnp.zeros(L)}
            updates, state = optimizer.update(grads, state, PARAMS)
        moved.append(np.asarray(updates["w_up"]))
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, FACTORED])
def test_a_weight_without_gradient_shrinks_by_its_decay(changes):
    """By the learning rate times the decay; without a decay it stays."""
    params = {"w_up": jnp.asarray(np.random.default_rng(0).normal(size=(L, D, F)), jnp.float32)}
    still = {"w_up": jnp.zeros((L, D, F))}
    for decay in (0.5, 0.0):
        config = OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=decay, **changes)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(still, optimizer.init(params), params)
        np.testing.assert_allclose(updates["w_up"], -0.1 * decay * params["w_up"], rtol=1e-6)


def test_a_factored_update_equals_adafactors():
    """Shazeer and Stern, arXiv 1804.04235, algorithm 4, computed by hand; the first step has no decay.

    Tolerance: float32 means of 256 squares, summed in another order.
    """
    config = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=1e9, b1=0.0, second_moment="factored")
    optimizer = make_optimizer(config, 10)
    grad = np.random.default_rng(0).normal(size=(L, D, F)).astype(np.float32)
    grads = {"w_up": jnp.asarray(grad), "bias": jnp.ones(L)}
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    square = grad.astype(np.float64) ** 2
    rows, columns = square.mean(2, keepdims=True), square.mean(1, keepdims=True)
    expected = grad / np.sqrt(rows * columns / square.mean((1, 2), keepdims=True))
    expected /= max(1, np.sqrt((expected**2).mean()))
    np.testing.assert_allclose(updates["w_up"], -0.1 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"first_moment": "bfloat16"}, FACTORED, FACTORED | {"first_moment": "bfloat16"}])
def test_a_least_squares_problem_is_solved(changes):
    """As AdamW does: the loss falls to a hundredth. A first moment in bfloat16 is rounded by 0.4%."""
    key = jax.random.key(0)
    x, target = jax.random.normal(key, (512, D)), jax.random.normal(jax.random.fold_in(key, 1), (D, F))

    def loss(w):
        return jnp.mean((x @ (w["w_up"] - target)) ** 2)

    optimizer = make_optimizer(OptimizerConfig(lr=0.1, warmup_steps=1, **changes), 200)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    w = {"w_up": jnp.zeros((D, F))}
    state, first = optimizer.init(w), loss(w)
    for _ in range(200):
        w, state = step(w, state)
    assert loss(w) < first / 100


# -- schedules ---------------------------------------------------------------------------------------------------------


def rates(config: OptimizerConfig, steps: int, count: int) -> np.ndarray:
    """The rate of each of the first `count` steps of a run of `steps`."""
    return np.asarray(jax.vmap(learning_rate(config, steps))(jnp.arange(count)))


CONFIGS = st.builds(
    OptimizerConfig,
    lr=st.just(1.0),
    schedule=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 30),
    end_lr_fraction=st.sampled_from([0.0, 0.1, 1.0]),
    decay_share=st.sampled_from([0.0, 0.2, 1.0]),
    cycles=st.integers(1, 5),
)


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.integers(1, 40), st.integers(0, 30))
def test_a_longer_run_follows_the_curve_of_its_start_and_stays_at_its_end(config, steps, more):
    resumed = dataclasses.replace(config, schedule_steps=steps)
    curve = rates(resumed, steps + more, steps + more + 1)
    np.testing.assert_array_equal(curve[: steps + 1], rates(config, steps, steps + 1))
    assert (curve[steps:] == curve[steps]).all()


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.integers(1, 40))
def test_every_schedule_warms_up_to_the_peak_and_ends_where_it_says(config, steps):
    """Tolerance: float32 cosines and divisions of a rate of 1."""
    curve, warmup = rates(config, steps, steps + 1), min(config.warmup_steps, steps - 1)
    first = min(warmup, round(steps / config.cycles) - 1) if config.schedule == "restarts" else warmup
    if first > 0:
        np.testing.assert_allclose(curve[: first + 1], np.arange(first + 1) / first, atol=1e-6)
    end = 1.0 if config.schedule == "constant" else config.end_lr_fraction
    if config.schedule != "wsd" or round(config.decay_share * steps):
        assert curve[steps] == pytest.approx(end, abs=1e-6)
    assert curve.max() <= 1 + 1e-6
    assert curve[max(first, 0) :].min() >= config.end_lr_fraction - 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_every_schedule_starts_at_the_peak(schedule):
    """Also a run of one step, which has no room for a warm-up."""
    for warmup, steps in ((0, 10), (0, 1), (5, 1)):
        curve = rates(OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup), steps, steps)
        assert curve[0] == curve.max() == 1


def test_wsd_is_stable_and_then_linear_and_restarts_begin_at_the_peak_again():
    wsd = OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_share=0.2, end_lr_fraction=0.1)
    curve = rates(wsd, 100, 101)
    np.testing.assert_allclose(curve[10:81], 1.0)
    np.testing.assert_allclose(curve[80:], 1 - 0.9 * np.arange(21) / 20, atol=1e-6)  # float32
    restarts = OptimizerConfig(lr=1.0, schedule="restarts", warmup_steps=10, cycles=4, end_lr_fraction=0.1)
    curve = rates(restarts, 100, 101)
    np.testing.assert_allclose(curve[[10, 25, 50, 75]], 1.0, atol=1e-6)
    assert (curve[[24, 49, 74]] < 0.12).all()
    assert (curve[[26, 51, 76]] < 1).all()
    np.testing.assert_array_equal(curve[25:50], curve[50:75])


# -- groups ------------------------------------------------------------------------------------------------------------


def leaves(value: float = 1.0):
    """The parameters of a model with every leaf that there is, all of `value`."""
    untied = dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True, tie_embeddings=False)
    spec = model_leaves(untied, (PUBLIC, "news"))
    return unflatten({path: jnp.full(leaf.shape, value) for path, leaf in spec.items()})


def test_only_matrices_and_the_head_decay_unless_asked():
    """Without a gradient a leaf that decays loses `lr * weight_decay` of itself in a step; the others keep all bits."""
    params = leaves()
    for groups, more in ((None, ()), ("trunk/.*norm|.*/router decay=0.5", ("norm", "router"))):
        config = OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=0.25, groups=groups)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(leaves(0.0), optimizer.init(params), params)
        for path, update in flatten(updates).items():
            name = path.rpartition("/")[2]
            share = 0.5 if name.endswith(more) and more else float(name.startswith("w_") or name == "head")
            np.testing.assert_allclose(update, -0.1 * 0.25 * share, rtol=1e-6)  # float32
            assert share or not np.asarray(update).any()


def test_a_group_scales_the_rate_of_its_leaves_only():
    """Its moments are those of the other leaves: the whole update is the usual one, times the factor."""
    params, grads = leaves(), jax.tree.map(lambda leaf: jnp.linspace(-1, 1, leaf.size).reshape(leaf.shape), leaves())

    def updates(**changes):
        optimizer = make_optimizer(OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=0.25, **changes), 10)
        return flatten(optimizer.update(grads, optimizer.init(params), params)[0])

    usual = updates()
    grouped = updates(groups="experts/news/bias lr=8; experts/.*/(router|bias) lr=4; trunk/.* lr=0")
    for path, update in grouped.items():
        inner = "bias" if path == "experts/news/bias" else path.partition("/")[0]
        factor = {"bias": 8, "trunk": 0, "experts": 4 if path.endswith(("router", "bias")) else 1}[inner]
        np.testing.assert_array_equal(update, factor * usual[path])  # powers of two are exact


@pytest.mark.parametrize("changes", [{}, FACTORED])
def test_groups_name_experts_that_a_mesh_stacks(changes):
    """The updates of three stacked experts, with an empty slot, are those of named ones, whatever their factors.

    Equal but for the means of the factored moments: those are float32, in another order.
    """
    names, rng = ("public", "code", "news"), np.random.default_rng(0)
    groups = "experts/news/.* lr=0; experts/code/w_up lr=4 decay=2; experts/code/w_down decay=0"
    config = OptimizerConfig(lr=0.5, warmup_steps=0, weight_decay=0.25, groups=groups, **changes)
    optimizer = make_optimizer(config, 10, reversed(names))

    def draw():
        shapes = {"w_up": (L, D, F), "w_down": (L, F, D)}
        return {n: {w: rng.normal(size=shape).astype(np.float32) for w, shape in shapes.items()} for n in names}

    def stacked(experts):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[:, :]), stack_weights(experts, 4), is_leaf=is_leaf)

    def is_leaf(node):
        return isinstance(node, StackedLeaf)

    params, grads = draw(), draw()
    updates = []
    for form in (lambda experts: experts, stacked):
        whole = {"experts": form(params)}
        updates.append(optimizer.update({"experts": form(grads)}, optimizer.init(whole), whole)[0]["experts"])
    named, again = updates[0], unstack_weights(updates[1], names)
    for path, update in flatten(named).items():
        np.testing.assert_allclose(flatten(again)[path], update, rtol=1e-5 if changes else 0, err_msg=path)
        assert np.asarray(update).any() == (not path.startswith("news"))
    for leaf in updates[1]["stacked"].values():
        assert not np.asarray(leaf[:, 3]).any()
    with pytest.raises(ConfigError, match=r"'experts/stacked/\.\*' .* decides no trained parameter"):
        make_optimizer(dataclasses.replace(config, groups="experts/stacked/.* lr=0"), 10, names).init(whole)
    with pytest.raises(FlexMoEError, match="does not know whose experts/stacked/w_down is"):
        make_optimizer(config, 10).init(whole)


def test_the_state_does_not_depend_on_the_groups():
    """So a checkpoint can be read with other groups."""
    plain, grouped = (
        make_optimizer(OptimizerConfig(groups=groups), 10).init(leaves()) for groups in (None, "experts/.* lr=3")
    )
    assert jax.tree.structure(plain) == jax.tree.structure(grouped)


def test_clipping_is_over_all_groups_together():
    """The norm of the clipped gradient of all leaves is `clip_norm`; a factor does not enter it."""
    params = leaves()
    config = OptimizerConfig(lr=1.0, warmup_steps=0, clip_norm=0.5, b1=0.0, groups="experts/.*/router lr=3")
    state = make_optimizer(config, 10).init(params)
    _, state = make_optimizer(config, 10).update(leaves(7.0), state, params)
    [adam] = [part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    assert optax.tree.norm(adam.mu) == pytest.approx(0.5, rel=1e-5)  # float32 sums


def test_the_table_shows_every_trained_leaf_once_by_the_group_that_decides_it():
    optimizer = OptimizerConfig(groups="experts/.*/router lr=3; experts/.* lr=0.5")
    sizes = {"steps": 1, "batch_size": 1, "seq_len": 1}
    run = RunConfig(owner=PUBLIC, data="d", out="o", public="p", optimizer=optimizer, **sizes)
    params, table = leaves(), group_table(run, leaves())
    trained = {path: leaf for path, leaf in flatten(params).items() if path != "experts/public/bias"}
    assert sum(count for _, _, count in table) == sum(leaf.size for leaf in trained.values())
    assert [(group.pattern, group.lr, group.decay, number) for group, number, _ in table] == [
        ("experts/.*/router", 3.0, 0.0, 2),
        ("experts/.*", 0.5, 0.0, 1),
        ("experts/.*", 0.5, 1.0, 6),
        (".*", 1.0, 0.0, 9),
        (".*", 1.0, 1.0, 5),
    ]
    assert set(factors_of(optimizer, trained)) == set(trained)


def test_a_group_that_decides_no_trained_leaf_is_refused_by_name():
    for groups, words in (
        (
            "experts/news/roter lr=3",
            r"'experts/news/roter' .* decides no trained parameter: trained are ",
        ),
        ("experts/.* lr=1; .*/bias lr=3", "'.*/bias' .*: earlier groups decide experts/news/bias"),
    ):
        optimizer = make_optimizer(OptimizerConfig(groups=groups), 10)
        with pytest.raises(ConfigError, match=words):
            optimizer.init({"experts": leaves()["experts"]})


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("experts/.*", "which changes nothing"),
        ("experts/.* rate=3", "unknown setting 'rate'"),
        ("experts/.* lr=fast", "lr is 'fast'"),
        ("experts/.* decay=-1", "decay is '-1'"),
        ("experts/(.* lr=3", "which is not a pattern"),
    ],
)
def test_groups_that_cannot_be_read_are_refused(groups, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as refusal:
        OptimizerConfig(groups=groups)
    assert refusal.value.remedy


def test_groups_are_read_in_their_order():
    rules = OptimizerConfig(groups=" a{1,2}/(?:b|c) lr=3 decay=0.5 ; d lr=1e-1;").rules
    assert rules == (Group("a{1,2}/(?:b|c)", 3.0, 0.5), Group("d", 0.1, None), Group(".*", 1.0, None))


@pytest.mark.parametrize(
    ("name", "value"), [("first_moment", "float16"), ("second_moment", "none"), ("schedule", "linear")]
)
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        OptimizerConfig(**{name: value})


def test_stacked_experts_get_the_updates_of_named_ones_with_factored_moments():
    """A mesh that splits experts stacks them, here with an empty slot; their updates are bounded each by itself."""
    names, rng = ("public", "code", "news"), np.random.default_rng(0)
    grads = {name: {"w_up": jnp.asarray(rng.normal(size=(L, D, F)), jnp.float32)} for name in names}
    optimizer = make_optimizer(OptimizerConfig(lr=1.0, warmup_steps=0, b1=0.0, **FACTORED), 10, names)

    def stacked(experts):
        stack = jnp.stack([experts[name]["w_up"] for name in names], 1)
        return {"stacked": {"w_up": jnp.pad(stack, ((0, 0), (0, 1), (0, 0), (0, 0)))}}

    def last_update(form):
        zeros = jax.tree.map(jnp.zeros_like, {"experts": form(grads)})
        state = optimizer.init(zeros)
        for factors in ((1.0, 1.0, 1.0), (0.5, 0.5, 9.0)):  # at last one expert is over the bound, the others are not
            scaled = {n: {"w_up": f * grads[n]["w_up"]} for n, f in zip(names, factors, strict=True)}
            updates, state = optimizer.update({"experts": form(scaled)}, state, zeros)
        return updates["experts"]

    named, stack = last_update(lambda experts: experts), last_update(stacked)["stacked"]["w_up"]
    for i, name in enumerate(names):
        # float32 means in another order; updates are of order 1.
        np.testing.assert_allclose(stack[:, i], named[name]["w_up"], rtol=1e-4, atol=1e-6)
    assert not np.asarray(stack[:, 3]).any()
