"""Frozen matrices in int8 and nf4: close to what they stand for, and the same step as with that in their place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.quantized import DTYPES, dequantize, is_quantized, quantize, quantized_shapes
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.params import EXPERT, FFN_WEIGHTS, owner_leaves
from flexmoe_jax.training.loop import train
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import create_state, split_state
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.training.validation import distance
from flexmoe_jax.tree import PUBLIC, flatten
from tests.tiny import MODEL, contents, expert_run, max_difference, random_params, random_release, write_documents

# Half of the widest gap between two values that a block can hold, in units of its largest absolute value: 127.5 steps
# for int8; for nf4 its levels -1 and -0.6962 (QLoRA, appendix E).
GAPS = {"int8": 0.5 / 127.5 * 1.01, "nf4": 0.1520}


def whole(quantized, dtype=jnp.float32) -> np.ndarray:
    return np.asarray(dequantize(jax.tree.map(jnp.asarray, quantized), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "block"), [(192, 64), (96, 32), (7, 1)])
def test_every_weight_is_within_half_a_step_of_its_block(dtype, width, block):
    rng = np.random.default_rng(0)
    leaf = (rng.standard_normal((2, 5, width)) * rng.lognormal(0, 3, (2, 5, 1))).astype(np.float32)  # rows of any scale
    leaf[1, 3] = 0
    found = quantize(leaf, dtype)
    blocks = leaf.reshape(2, 5, -1, block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    assert (np.abs(whole(found).reshape(blocks.shape) - blocks) <= GAPS[dtype] * largest).all()
    assert not whole(found)[1, 3].any()
    assert found.scale.shape == (2, 5, width // block)
    shapes = quantized_shapes(leaf, dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), found)


def test_the_four_bits_are_those_of_the_paper():
    """The levels of NF4 in QLoRA's appendix E, which its authors' code rounds to (bitsandbytes, functional.py)."""
    levels = np.unique(whole(quantize(np.linspace(-1, 1, 64 * 99).reshape(99, 1, 64).clip(-1, 1), "nf4")[:1]))
    first = whole(quantize(np.concatenate([[-1.0], np.linspace(-1, 1, 63)])[None, None], "nf4"))
    expected = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    expected += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert np.unique(first) == pytest.approx(expected, abs=1e-6)
    assert set(levels) <= set(np.unique(first))


RUN = RunConfig("news", "", "", 3, 4, 16, public="-", domain_vector="-", optimizer=OptimizerConfig(lr=1e-2))


def hybrid(rank: int | None):
    params = random_params(MODEL, (PUBLIC, "news"))
    own = dict(params["experts"]["news"])
    if rank:
        rng = np.random.default_rng(3)
        leaves = owner_leaves(MODEL, "news", dict.fromkeys(FFN_WEIGHTS, rank))
        own = {n: rng.standard_normal(leaf.shape).astype(np.float32) * 0.1 for n, leaf in leaves.items()}
    return {**params, "experts": {PUBLIC: params["experts"][PUBLIC], "news": own}}


def steps(run: RunConfig, frozen_of):
    """(trainable leaves, frozen, loss, distance) after two steps whose frozen leaves `frozen_of` makes of the run's."""
    params, optimizer = hybrid(4 if run.rank else None), make_optimizer(run.optimizer, run.steps)
    state, frozen = create_state(mesh_of_one(), params, run, optimizer)
    frozen = frozen_of(frozen)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 17)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((4, 16), np.int32), np.ones((4, 16), np.float32))
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    step = make_train_step(MODEL, run)
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
    assert before == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    return flatten(state.trainable), frozen, float(metrics["loss"]), float(distance(state.trainable, frozen, "news"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", [{}, {"rank": "4"}, {"rank": "4", "remat": True}])
def test_a_step_is_that_of_the_matrices_the_blocks_stand_for(dtype, compute, how):
    run = dataclasses.replace(RUN, frozen_dtype=dtype, compute_dtype=compute, **how)

    def plain(frozen):
        return jax.tree.map(
            lambda leaf: dequantize(leaf, compute) if is_quantized(leaf) else leaf, frozen, is_leaf=is_quantized
        )

    ours, frozen, loss, apart = steps(run, lambda frozen: frozen)
    theirs, _, expected, expected_apart = steps(run, plain)
    held = {path for path, leaf in flatten(frozen).items() if is_quantized(leaf)}
    assert held == {f"experts/public/{name}" for name in FFN_WEIGHTS} | {f"trunk/blocks/w_{n}" for n in "qkvo"}
    # The same numbers in the same order but for the fusion of a cast: a low-rank sum takes the blocks in float32.
    tolerance = 1e-6 if compute == "float32" else 2e-2
    assert loss == pytest.approx(expected, rel=tolerance)
    assert apart == pytest.approx(expected_apart, rel=tolerance)
    differences = {path: max_difference(leaf, ours[path]) for path, leaf in theirs.items()}
    assert max(differences.values()) < tolerance
    _, _, exact, _ = steps(dataclasses.replace(run, frozen_dtype=None), lambda frozen: frozen)
    assert abs(exact - expected) > 1e-6  # the blocks are not the exact matrices


def test_an_expert_trained_beside_quantized_matrices_belongs_to_the_exact_model(tmp_path):
    """Its package says how it was trained; the public model keeps its bytes; whole matrices start exact."""
    release, _ = random_release(tmp_path)
    before = contents(release)
    mixed = {"public_data": str(write_documents(tmp_path / "sample", "public")), "public_fraction": 0.5}
    run = functools.partial(expert_run, tmp_path, "news", release, frozen_dtype="nf4", router="generative", **mixed)
    package = train(run(rank="4"))
    record = read_manifest(package).record
    assert record.training["config"]["frozen_dtype"] == "nf4"
    assert contents(release) == before
    merged = merge(release, [package], tmp_path / "merged").path
    assert all(check.ok for check in verify_model(merged))
    whole_run = run(out=str(tmp_path / "whole"), optimizer=OptimizerConfig(lr=1e-12))
    own, public = load_package(train(whole_run)), load_package(open_model(release).package(PUBLIC))
    for name in FFN_WEIGHTS:
        assert max_difference(own[name], public[name]) < 1e-9  # the rate: not those that the blocks stand for


def test_only_owners_runs_quantize_and_not_on_an_expert_axis():
    with pytest.raises(ConfigError, match=r"config.frozen_dtype is 'int8': this run trains a new public model"):
        RunConfig(PUBLIC, "d", "o", 1, 1, 8, model=MODEL, domain_vector="v", frozen_dtype="int8")
    with pytest.raises(ConfigError, match=r"config.frozen_dtype is 'int8': this run trains all experts"):
        RunConfig(PUBLIC, "d", "o", 1, 1, 8, public="p", frozen_dtype="int8")
    with pytest.raises(ConfigError, match=r"config.frozen_dtype is 'int4'"):
        dataclasses.replace(RUN, frozen_dtype="int4")
    run = dataclasses.replace(RUN, frozen_dtype="int8")
    with pytest.raises(ConfigError, match=f"'int8', and the mesh splits experts .{EXPERT}=2.*\n.*set {EXPERT}=1"):
        split_state(hybrid(None), run, 2)
