"""Microbatches: they change only rounding, and on a CPU their number is chosen."""

import dataclasses

import jax
import numpy as np
import pytest

from flexmoe_jax.params import AXES
from flexmoe_jax.training import step as step_module
from flexmoe_jax.training.step import make_train_step, microbatches
from flexmoe_jax.tree import PUBLIC, flatten
from tests.tiny import MODEL
from tests.training.test_step import RUN, batch, hybrid, start


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    """Unequal weights per microbatch: the mean of microbatch means would differ in the first digit."""
    data = batch()
    data.weights[:2, 3:] = 0.0
    results = []
    for accumulation in (1, 2, 4):
        run = dataclasses.replace(RUN, accumulation=accumulation)
        state, frozen = start(run, hybrid())
        state, metrics = make_train_step(MODEL, run)(state, frozen, data)
        results.append((state.opt_state, metrics))
    for opt_state, metrics in results[1:]:
        # Sums of the same float32 terms in another order.
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], results[0][1]["grad_norm"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), opt_state, results[0][0])


def test_accumulation_changes_only_rounding_also_of_biases_that_microbatches_pull_apart():
    """The contrast loss pulls every bias up on own text and down on public text, here in microbatches of their own."""
    own = np.repeat(np.float32([[1], [1], [0], [0]]), 16, axis=1)
    slow = dataclasses.replace(RUN.optimizer, lr=1e-3)
    contrast = dataclasses.replace(RUN, optimizer=slow, router_contrast=0.1, public_data="x", public_fraction=0.5)
    joint = dataclasses.replace(RUN, optimizer=slow, owner=PUBLIC, domain_vector=None, top_k=2)
    for run in (contrast, joint):
        trained = []
        for accumulation in (1, 4):
            state, frozen = start(run, hybrid())
            step = make_train_step(MODEL, dataclasses.replace(run, accumulation=accumulation))
            for n in range(3):  # the rate of the first step is 0
                state, _ = step(state, frozen, dataclasses.replace(batch(n), own=own))
            trained.append(flatten(state.trainable))
        assert (np.asarray(trained[0]["experts/news/bias"]) < -1e-4).any()
        for path, leaf in trained[1].items():
            # Adam moves each weight by about the rate, 1e-3, whatever its gradient: sums in another order change that
            # by 1e-5 of it. Values around 1 (norms) are themselves rounded by 1.2e-7.
            rounding = 1.2e-7 if path.endswith("norm") else 1.5e-8
            np.testing.assert_allclose(leaf, trained[0][path], rtol=0, atol=rounding, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 16, "seq_len": 256}, 4),
        ({"batch_size": 16, "seq_len": 64}, 1),
        ({"batch_size": 6, "seq_len": 512}, 3),
        ({"batch_size": 6, "seq_len": 4096}, 6),
        ({"batch_size": 16, "seq_len": 256, "accumulation": 2}, 2),
        ({"batch_size": 16, "seq_len": 256, "load_balance": 0.01}, 1),
    ],
)
def test_microbatches_on_a_cpu_have_1024_tokens_of_a_device_unless_told(changes, expected):
    run = dataclasses.replace(RUN, **changes)
    assert microbatches(run) == expected

    def on_two(platform: str) -> int:
        device = jax.sharding.AbstractDevice(platform, 1, platform)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 2, 1, 1), AXES, abstract_device=device)):
            return microbatches(run)

    assert on_two("tpu") == (run.accumulation or 1)
    # Half of a microbatch is on each device, and its rows are a multiple of two.
    assert on_two("cpu") == (run.accumulation or {4: 2, 1: 1, 3: 3, 6: 3}[expected])


def test_the_chosen_microbatches_are_those_of_the_step(monkeypatch):
    """The program is that of the number given by hand."""
    state, frozen = start(RUN, hybrid())

    def program(**changes) -> str:
        return make_train_step(MODEL, dataclasses.replace(RUN, **changes)).lower(state, frozen, batch()).as_text()

    monkeypatch.setattr(step_module, "CPU_TOKENS", 16)
    assert program() == program(accumulation=4) != program(accumulation=1)
