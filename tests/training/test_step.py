"""The training step: frozen leaves do not change, accumulation is exact, bad batches change nothing, biases recover."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.decoder import Decoder, forward, hidden_states, init_params
from flexmoe_jax.model.flops import products
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training import step as step_module
from flexmoe_jax.training.freezing import freezing_mask, freezing_table
from flexmoe_jax.training.optimizer import learning_rate, make_optimizer
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC, combine, flatten, partition
from tests.tiny import MODEL

RUN = RunConfig(
    owner="news",
    data="",
    out="",
    public="public",
    domain_vector="-",
    steps=10,
    batch_size=4,
    seq_len=16,
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, weight_decay=0.1),
)


def hybrid(owner: str = "news"):
    """{public, owner}; the owner's feed-forward network is a copy of the public one."""
    params = init_params(MODEL, jax.random.key(0), (PUBLIC, owner))
    copied = {leaf: params["experts"][PUBLIC][leaf] for leaf in ("w_gate", "w_up", "w_down")}
    return {**params, "experts": {**params["experts"], owner: {**params["experts"][owner], **copied}}}


def batch(seed: int = 0, rows: int = 4):
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, 17)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((rows, 16), np.int32), np.ones((rows, 16), np.float32))


def start(run: RunConfig, params):
    return create_state(mesh_of_one(), params, run, make_optimizer(run.optimizer, run.steps))


def bits(tree) -> dict:
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


def test_frozen_leaves_keep_every_bit_with_weight_decay_on():
    params = hybrid()
    state, frozen = start(RUN, params)
    step = make_train_step(MODEL, RUN)
    for n in range(3):
        state, _ = step(state, frozen, batch(n))
    before, after = bits(params), bits(combine(state.trainable, frozen))
    assert set(before) == set(after)
    for path in before:
        moved = before[path] != after[path]
        assert moved == path.startswith("experts/news/"), path


def test_a_public_run_trains_all_but_the_public_router_row_and_bias():
    params = init_params(MODEL, jax.random.key(0))
    run = dataclasses.replace(RUN, owner=PUBLIC, model=MODEL, public=None)
    state, frozen = start(run, params)
    step = make_train_step(MODEL, run)
    for n in range(3):
        state, _ = step(state, frozen, batch(n))
    before, after = bits(params), bits(combine(state.trainable, frozen))
    still = {path for path in before if before[path] == after[path]}
    assert still == {"experts/public/router", "experts/public/bias"}


def test_moments_exist_for_trainable_leaves_only():
    params = hybrid()
    state, _ = start(RUN, params)
    trained = sum(leaf.size for path, leaf in flatten(params).items() if path.startswith("experts/news/"))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trained


def test_a_step_returns_only_trainable_leaves_and_their_moments():
    """From the compiled program: its outputs hold no gradient, moment or copy of a frozen leaf."""
    params = hybrid()
    state, frozen = start(RUN, params)
    compiled = make_train_step(MODEL, RUN).lower(state, frozen, batch()).compile()
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    rest = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    # Three arrays per trained leaf; counters, metrics and the table of outputs are a few hundred bytes.
    assert 0 <= compiled.memory_analysis().output_size_in_bytes - 4 * 3 * trained < 2000 < 4 * rest


def test_frozen_weights_cost_no_product():
    """From the compiled program, per token: with one layer and a frozen trunk, only the path to the owner's expert is
    differentiated, and only the expert's three matrices have a gradient (within 5%: norms, softmax, router).
    """
    one = dataclasses.replace(
        MODEL,
        vocab_size=512,
        num_layers=1,
        d_model=128,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        d_ff=512,
        max_seq_len=64,
    )
    run, p = dataclasses.replace(RUN, batch_size=8, seq_len=64), products(one, 64)
    state, frozen = start(run, init_params(one, jax.random.key(0), (PUBLIC, "news")))
    step = make_train_step(one, run).lower(state, frozen, Batch.shapes(8, 64)).compile()
    forward = p["head"] + p["attention"] + p["scores"] + 2 * p["expert"]
    backward = p["head"] + p["expert"] / 3 + p["expert"]
    # The whole square of scores is computed at this length (MIN_BLOCK).
    assert step.cost_analysis()["flops"] / (8 * 64) <= 1.05 * (forward + p["scores"] + backward)


def test_matrices_cast_once_per_step_have_the_gradients_of_float32_matrices(monkeypatch):
    """Rounded to bfloat16, which has 8 bits. Leaves that the model does not cast stay in float32.

    On a CPU none is cast: a product casts the layer that it multiplies, and its gradient is not rounded.
    """
    monkeypatch.setattr(step_module, "cpu_form", lambda: False)
    run = dataclasses.replace(RUN, compute_dtype="bfloat16")
    trainable, frozen = partition(hybrid(), freezing_mask(hybrid(), "news"))
    used = step_module._as_used(trainable, jnp.bfloat16)
    totals = {"all": jnp.float32(64)}

    def gradients(leaves):
        losses = functools.partial(step_module._losses, MODEL, run)
        return flatten(jax.jit(jax.grad(losses, has_aux=True))(leaves, frozen, batch(), totals)[0])

    ours, expected = gradients(used), gradients(trainable)
    for path, leaf in ours.items():
        assert leaf.dtype == (jnp.bfloat16 if "/w_" in path else jnp.float32), path
        np.testing.assert_allclose(leaf.astype(jnp.float32), expected[path], rtol=2**-8, atol=1e-6, err_msg=path)


def test_keeping_the_first_layer_out_of_the_scan_changes_no_gradient():
    """A CPU's step does this with a frozen trunk (sums in another order: 1e-6)."""
    params = jax.tree.map(lambda leaf: leaf + 0.01, hybrid())
    trainable, frozen = partition(params, freezing_mask(params, "news"))

    def loss(trainable, first_apart):
        params = combine(trainable, frozen)
        x_BTD, logits_LNE = hidden_states(Decoder(MODEL), params, batch().tokens, first_apart=first_apart)
        return (x_BTD**2).mean() + (logits_LNE**2).mean()

    apart, scanned = (jax.jit(jax.grad(loss), static_argnums=1)(trainable, flag) for flag in (True, False))
    for path, ours in flatten(apart).items():
        theirs = flatten(scanned)[path]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(jnp.abs(theirs).max()), err_msg=path)


def test_remat_halves_the_memory_of_a_step_of_8_layers_also_on_a_cpu():
    """From the compiled program: the arrays kept for the backward pass."""
    deep, rows = dataclasses.replace(MODEL, num_layers=8, d_ff=256), batch(rows=32)
    params = init_params(deep, jax.random.key(0), (PUBLIC, "news"))
    memory = []
    for remat in (False, True):
        run = dataclasses.replace(RUN, batch_size=32, remat=remat)
        state, frozen = start(run, params)
        compiled = make_train_step(deep, run).lower(state, frozen, rows).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[1] < memory[0] / 2


def test_the_initial_pair_gives_the_logits_of_the_public_model():
    """Both feed-forward networks are equal, so the router does not matter (sums of equal terms: 1e-6)."""
    params = hybrid()
    alone = {**params, "experts": {PUBLIC: params["experts"][PUBLIC]}}
    tokens = batch().tokens
    np.testing.assert_allclose(
        forward(Decoder(MODEL), params, tokens).logits_BTV, forward(Decoder(MODEL), alone, tokens).logits_BTV, atol=1e-6
    )


def test_a_step_keeps_router_biases_at_0_or_below():
    """An expert that lowers the loss pulls its biases up, which are at the bound; an old one's may be above it."""
    params = hybrid()
    useless = {**params["experts"][PUBLIC], "w_down": 30 * params["experts"][PUBLIC]["w_gate"].swapaxes(1, 2)}
    for before in (0.0, 0.5):
        news = {**params["experts"]["news"], "bias": jnp.full(MODEL.num_layers, before)}
        state, frozen = start(RUN, {**params, "experts": {PUBLIC: useless, "news": news}})
        step = make_train_step(MODEL, RUN)
        for n in range(3):
            state, _ = step(state, frozen, batch(n))
            assert (np.asarray(state.trainable["experts"]["news"]["bias"]) <= 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_batch_changes_no_bit_and_is_counted(poison):
    state, frozen = start(RUN, hybrid())
    step = make_train_step(MODEL, RUN)
    state, _ = step(state, frozen, batch(0))
    before = bits({"trainable": state.trainable}), [np.asarray(x).tobytes() for x in jax.tree.leaves(state.opt_state)]
    bad = batch(1)
    bad.weights[0, 0] = poison
    for n in (1, 2):
        state, metrics = step(state, frozen, bad)
        assert (int(metrics["bad_steps"]), int(metrics["skipped"])) == (n, n)
    after = bits({"trainable": state.trainable}), [np.asarray(x).tobytes() for x in jax.tree.leaves(state.opt_state)]
    assert before == after
    state, metrics = step(state, frozen, batch(2))
    assert (int(metrics["bad_steps"]), int(metrics["skipped"]), int(state.step)) == (0, 2, 4)


def test_a_bias_above_zero_recovers():
    """It has no effect and, with the plain derivative of min, no gradient."""
    params = hybrid()
    expert = {**params["experts"]["news"], "bias": jnp.full(MODEL.num_layers, 0.02)}
    # A harmful expert: descent must lower its share, and the bias is one way to do so.
    expert = {**expert, "w_down": 30.0 * jax.random.normal(jax.random.key(5), expert["w_down"].shape)}
    params = {**params, "experts": {**params["experts"], "news": expert}}
    state, frozen = start(RUN, params)
    step = make_train_step(MODEL, RUN)
    for n in range(8):
        state, _ = step(state, frozen, batch(n))
    assert (np.asarray(state.trainable["experts"]["news"]["bias"]) < 0).all()


def test_z_losses_are_in_the_gradient():
    norms = []
    for changes in ({}, {"z_loss": 1.0}, {"router_z_loss": 1.0}):
        run = (
            dataclasses.replace(RUN, z_loss=0.0, router_z_loss=0.0)
            if not changes
            else dataclasses.replace(RUN, **changes)
        )
        state, frozen = start(run, hybrid())
        norms.append(float(make_train_step(MODEL, run)(state, frozen, batch())[1]["grad_norm"]))
    assert len(set(norms)) == 3


def test_the_learning_rate_warms_up_then_falls_to_its_end():
    schedule = learning_rate(OptimizerConfig(lr=1.0, warmup_steps=10, end_lr_fraction=0.1), 100)
    values = [float(schedule(n)) for n in range(101)]
    assert values[0] == 0.0
    assert values[10] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(values[:11]))
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


def test_the_freezing_table_covers_every_parameter_once():
    params = hybrid()
    table = freezing_table(params, "news")
    assert sum(row[3] for row in table) == sum(leaf.size for leaf in flatten(params).values())
    trainable, frozen = partition(params, freezing_mask(params, "news"))
    assert sum(row[2] for row in table if row[1]) == len(flatten(trainable)) == 5
    assert sum(row[2] for row in table if not row[1]) == len(flatten(frozen))


def test_the_contrast_loss_teaches_the_router_to_tell_own_text_from_public_text():
    """Two kinds of text with different token ids: with the contrast loss the router separates them."""
    params = hybrid()
    run = dataclasses.replace(
        RUN,
        steps=40,
        router_contrast=1.0,
        public_data="x",
        public_fraction=0.5,
        optimizer=OptimizerConfig(lr=3e-2, warmup_steps=1),
    )
    rng = np.random.default_rng(0)

    def mixed():
        own, public = rng.integers(0, 3, (2, 17)), rng.integers(256, 259, (2, 17))
        data = batch()
        tokens = np.concatenate([own, public]).astype(np.int32)
        flags = np.repeat([[1.0], [1.0], [0.0], [0.0]], 16, axis=1).astype(np.float32)
        return dataclasses.replace(data, tokens=tokens[:, :-1], targets=tokens[:, 1:], own=flags)

    def share_of_own(run, data):
        state, frozen = start(run, params)
        step = make_train_step(MODEL, run)
        for _ in range(run.steps):
            state, _ = step(state, frozen, mixed())
        trained = combine(state.trainable, frozen)
        logits = forward(Decoder(MODEL), trained, data.tokens).router_logits_LNE
        probs = np.asarray(jax.nn.softmax(logits, axis=-1))[..., 1].mean(0).reshape(4, 16)
        return probs[:2].mean(), probs[2:].mean()

    own, public = share_of_own(run, mixed())
    assert own > 0.7 > 0.3 > public
    own, public = share_of_own(dataclasses.replace(run, router_contrast=0.0), mixed())
    assert own - public < 0.2


def test_the_contrast_loss_weights_own_and_public_tokens_equally():
    """With equal logits the loss is log 2 for any mix, also with accumulation."""
    data = dataclasses.replace(batch(), own=np.repeat(np.float32([[1], [1], [1], [0]]), 16, axis=1))
    values = []
    for accumulation in (1, 2):
        run = dataclasses.replace(
            RUN, accumulation=accumulation, router_contrast=1.0, public_data="x", public_fraction=0.25
        )
        params = hybrid()
        same = {**params["experts"]["news"], "router": params["experts"][PUBLIC]["router"]}
        state, frozen = start(run, {**params, "experts": {**params["experts"], "news": same}})
        values.append(float(make_train_step(MODEL, run)(state, frozen, data)[1]["router_contrast"]))
    np.testing.assert_allclose(values, np.log(2), rtol=1e-6)


def test_an_expert_without_the_public_one_trains_only_its_feed_forward_network():
    params = hybrid()
    alone = {**params, "experts": {"news": params["experts"]["news"]}}
    state, frozen = start(RUN, alone)
    step = make_train_step(MODEL, dataclasses.replace(RUN, coordinate=False, router_z_loss=0.0))
    for n in range(3):
        state, _ = step(state, frozen, batch(n))
    before, after = bits(alone), bits(combine(state.trainable, frozen))
    moved = {path for path in before if before[path] != after[path]}
    assert moved == {f"experts/news/{leaf}" for leaf in ("w_gate", "w_up", "w_down")}


def test_a_freeze_pattern_freezes_further_leaves():
    params = hybrid()
    mask = freezing_mask(params, "news", "experts/.*/bias")
    assert {path for path, trains in mask.items() if trains} == {
        f"experts/news/{leaf}" for leaf in ("w_gate", "w_up", "w_down", "router")
    }


def test_joint_training_moves_all_but_the_public_bias():
    params = hybrid()
    run = dataclasses.replace(RUN, owner=PUBLIC, domain_vector=None, top_k=1, load_balance=0.01)
    state, frozen = start(run, params)
    step = make_train_step(MODEL, run)
    for n in range(3):
        state, _ = step(state, frozen, batch(n))
    before, after = bits(params), bits(combine(state.trainable, frozen))
    # An owner's bias is initially 0 here, the bound: descent may leave it there.
    still = {path for path in before if before[path] == after[path]} - {"experts/news/bias"}
    assert still == {"experts/public/bias"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_load_balance_loss_is_1_when_balanced_and_the_number_of_experts_when_one_takes_all(accumulation):
    params = hybrid()
    for row, expected in ((0.0, 1.0), (1e4, 2.0)):
        experts = params["experts"]
        news = {**experts["news"], "router": jnp.zeros_like(experts["news"]["router"]), "bias": jnp.full(2, -row)}
        public = {**experts[PUBLIC], "router": jnp.zeros_like(news["router"])}
        run = dataclasses.replace(
            RUN,
            owner=PUBLIC,
            domain_vector=None,
            top_k=None if row == 0 else 1,
            load_balance=0.01,
            accumulation=accumulation,
        )
        state, frozen = start(run, {**params, "experts": {PUBLIC: public, "news": news}})
        _, metrics = make_train_step(MODEL, run)(state, frozen, batch())
        assert float(metrics["load_balance"]) == pytest.approx(expected, rel=1e-5)
