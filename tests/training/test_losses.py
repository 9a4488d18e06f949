"""What the loss of a training step depends on: documents by themselves, active experts only, small partitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.decoder import init_params
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC
from tests.tiny import MODEL

ROWS, LENGTH, SECOND = 2, 16, 7  # the second document of every row starts at token 7
SHAPE = {"data": "", "out": "", "batch_size": ROWS, "seq_len": LENGTH}
PUBLIC_RUN = RunConfig(owner=PUBLIC, model=MODEL, domain_vector="-", steps=40, **SHAPE)
JOINT_RUN = RunConfig(owner=PUBLIC, public="public", steps=40, **SHAPE)
OWN_RUN = RunConfig(owner="news", public="public", domain_vector="-", steps=40, **SHAPE)


def batch(seed: int = 0) -> Batch:
    """Two documents in every row, of which only the second counts."""
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    second = np.broadcast_to(np.arange(LENGTH) >= SECOND, (ROWS, LENGTH))
    return Batch(tokens[:, :-1], tokens[:, 1:], second.astype(np.int32), second.astype(np.float32))


@functools.cache
def step_of(run: RunConfig):
    """The compiled step of a run."""
    return make_train_step(MODEL, run)


def metrics_of(run: RunConfig, params, data: Batch, steps: int = 1) -> list[dict]:
    """The metrics of each of `steps` training steps on the same batch."""
    state, frozen = create_state(mesh_of_one(), params, run, make_optimizer(run.optimizer, run.steps))
    found = []
    for _ in range(steps):
        state, metrics = step_of(run)(state, frozen, data)
        found.append(metrics)
    return found


def changed(data: Batch, at: int) -> Batch:
    """`data` with other tokens from place 0 to `at`, which predict the same targets."""
    tokens = data.tokens.copy()
    tokens[:, :at] = (tokens[:, :at] + 1) % MODEL.vocab_size
    return dataclasses.replace(data, tokens=tokens)


@pytest.mark.parametrize("run", [PUBLIC_RUN, OWN_RUN], ids=["public", "own"])
def test_a_document_does_not_change_the_loss_of_another_in_its_row(run):
    """Of a row's two documents the second counts: other tokens in the first change neither its loss nor its gradient,
    another first token of its own does (float32 sums in the same order: 1e-6).
    """
    params = init_params(MODEL, jax.random.key(0), (PUBLIC,) if run.is_public else (PUBLIC, "news"))
    alone, beside, other = (metrics_of(run, params, changed(batch(), at))[0] for at in (0, SECOND, SECOND + 1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(beside[name], alone[name], rtol=1e-6, err_msg=name)
        assert abs(float(other[name]) - float(alone[name])) > 1e-5 * float(alone[name]), name


def test_training_runs_only_the_top_k_experts():
    """An expert that no token chooses reaches the loss with all experts active, and not with one."""
    params = init_params(MODEL, jax.random.key(0), (PUBLIC, "news"))
    experts = params["experts"]
    rows = {name: {**expert, "router": jnp.zeros_like(expert["router"])} for name, expert in experts.items()}
    second = {**rows["news"], "bias": jnp.full(MODEL.num_layers, -0.5)}
    losses = {}
    for top_k in (1, None):
        for scale in (1.0, 5.0):
            news = {**second, "w_down": scale * second["w_down"]}
            run = dataclasses.replace(JOINT_RUN, top_k=top_k)
            found = metrics_of(run, {**params, "experts": {**rows, "news": news}}, batch())[0]
            losses[top_k, scale] = float(found["loss"])
    assert losses[1, 1.0] == losses[1, 5.0] != losses[None, 1.0]
    assert losses[None, 1.0] != losses[None, 5.0]


@pytest.mark.parametrize(
    ("name", "run"), [("z_loss", PUBLIC_RUN), ("router_z_loss", OWN_RUN)], ids=["vocabulary", "router"]
)
def test_a_z_loss_pulls_its_partition_towards_1(name, run):
    """Its value, the squared log of the partition, falls by more than half when it dominates the loss; it does not
    fall so far without the z-loss.
    """
    params = init_params(MODEL, jax.random.key(0), (PUBLIC,) if run.is_public else (PUBLIC, "news"))
    optimizer = OptimizerConfig(lr=5e-2, warmup_steps=1)
    run = dataclasses.replace(run, z_loss=0.0, router_z_loss=0.0, optimizer=optimizer)
    pulled = metrics_of(dataclasses.replace(run, **{name: 10.0}), params, batch(), steps=20)
    free = metrics_of(run, params, batch(), steps=20)
    assert float(pulled[-1][name]) < float(pulled[0][name]) / 2
    assert float(pulled[-1][name]) < float(free[-1][name]) / 2
