"""Which products are float32 on every platform (from lowered programs), and training and scoring round alike."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.evaluate import lm
from flexmoe_jax.evaluate.perplexity import _score_batch
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.training import loop
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import PUBLIC
from tests.tiny import MODEL, TINY, expert_run, random_params, stacked

EXPERTS = ("public", "code", "news")
BATCH = Batch.shapes(2, 5)  # no other size of the model is 3 (experts) or 24 (vocabulary)


def products(lowered: jax.stages.Lowered) -> list[tuple[list[list[int]], list[int], bool]]:
    """(shapes of the operands, shape of the result, whether it is HIGHEST) of every product of the program."""
    found = []
    for line in lowered.as_text().splitlines():
        if "dot_general" in line:
            *operands, result = ([int(n) for n in s.split("x")[:-1]] for s in re.findall(r"tensor<([^>]*)>", line))
            found.append((operands, result, "precision = [HIGHEST, HIGHEST]" in line))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_training_the_router_and_the_logits_are_float32_and_the_rest_is_as_configured(dtype):
    """The router in both directions; of the head only the logits, not its derivatives."""
    run = RunConfig(PUBLIC, "", "", 3, 2, 5, public="public", compute_dtype=dtype)
    state, frozen = create_state(mesh_of_one(), random_params(TINY, EXPERTS), run, make_optimizer(run.optimizer, 3))
    found = products(make_train_step(TINY, run).lower(state, frozen, BATCH))
    exact = {
        "router": [len(EXPERTS) in (*operands[0], *operands[1]) for operands, _, _ in found],
        "logits": [operands[1] == [16, 24] and result[-1] == 24 for operands, result, _ in found],
    }
    assert sum(exact["router"]) == 3
    assert sum(exact["logits"]) == 1
    assert len(found) > 20
    for product, router, logits in zip(found, exact["router"], exact["logits"], strict=True):
        assert product[2] == (router or logits), product


def test_all_products_of_scoring_are_float32():
    """Of bits per byte and of the log-likelihoods of benchmarks."""
    run, params = Decoder(TINY, 2, "sparse"), stacked(random_params(TINY, EXPERTS))
    ids = BATCH.tokens
    cache = jax.eval_shape(lambda: lm._prefill(run, 8, params, jnp.zeros((1, 3), jnp.int32)))
    for lowered in (
        _score_batch.lower(run, params, BATCH),
        lm._whole.lower(run, params, ids, ids),
        lm._prefill.lower(run, 8, params, jax.ShapeDtypeStruct((1, 3), jnp.int32)),
        lm._after.lower(run, params, cache, 3, ids, ids),
    ):
        found = products(lowered)
        assert len(found) >= 7
        assert all(highest for _, _, highest in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_a_product_in_the_compute_dtype_gives_the_loss_of_its_training(world, tmp_path, monkeypatch, dtype):
    """A learning rate of 0: the package is what the first step saw. Also in bfloat16 both round the same leaves."""
    release = world / "public" / "run" / "model"
    run = expert_run(
        tmp_path,
        "news",
        release,
        domain_vector=None,
        expert=str(world / "news" / "run" / "package"),
        steps=1,
        batch_size=16,
        compute_dtype=dtype,
        optimizer=OptimizerConfig(lr=0.0),
    )
    seen, place = [], loop.place_batch
    monkeypatch.setattr(loop, "place_batch", lambda mesh, batch: seen.append(batch) or place(mesh, batch))
    package = load_package(loop.train(run))
    params = load_params(open_model(release))
    params = stacked({**params, "experts": {**params["experts"], "news": package}})
    lines = (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()
    loss = json.loads(lines[0])["loss"]
    nats_BT, _ = _score_batch(Decoder(MODEL, dtype=dtype), params, seen[0])
    # A mean of 512 losses of about 6 nats in float32.
    assert float(np.average(nats_BT, weights=seen[0].weights)) == pytest.approx(loss, abs=3e-6)


@pytest.mark.parametrize("owner", [PUBLIC, "news"])
def test_the_loss_of_a_bfloat16_step_is_the_score_of_its_float32_parameters(owner):
    """Parameters in which nothing is neutral: norms away from 1, biases below 0. Dense, as training runs here."""
    params = random_params(TINY, EXPERTS if owner == PUBLIC else ("public", "news"))
    given = {"public": "public", "compute_dtype": "bfloat16", "expert": None if owner == PUBLIC else "package"}
    run = RunConfig(owner, "", "", 3, 2, 16, **given)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 17)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((2, 16), np.int32), np.ones((2, 16), np.float32))
    state, frozen = create_state(mesh_of_one(), params, run, make_optimizer(run.optimizer, 3))
    _, metrics = make_train_step(TINY, run)(state, frozen, batch)
    nats_BT, _ = _score_batch(Decoder(TINY, dtype="bfloat16"), stacked(params), batch)
    # A mean of 32 losses of about 4 nats in float32.
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(nats_BT)), abs=2e-6)
