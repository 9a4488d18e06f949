"""The program that a plan is for, and the shapes of its arguments. Nothing is allocated.

train      an optimizer step, as training/loop.py runs it
prefill    generation's pass over prompts of `seq_len` tokens, which makes the cache
decode     generation's step by one token per row, with a cache of `seq_len` positions
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.cache import init_cache
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model.generate import GREEDY, first_token, next_token
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.mesh import replicated
from flexmoe_jax.parallel.specs import BATCH_SPEC, CACHE_SPEC, leaf_spec, path_text, tree_shardings
from flexmoe_jax.parallel.stacked import stack_weights
from flexmoe_jax.params import EXPERT, all_ranks, model_leaves, read_ranks
from flexmoe_jax.training.optimizer import make_optimizer
from flexmoe_jax.training.state import state_shapes
from flexmoe_jax.training.step import make_train_step
from flexmoe_jax.tree import Params, unflatten

KINDS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Work:
    """A program. `experts` are in canonical order; `run` also gives inference its batch, lengths and dtype."""

    model: ModelConfig
    experts: tuple[str, ...]
    run: RunConfig
    kind: str = "train"

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return jnp.dtype(self.run.compute_dtype)

    @property
    def active(self) -> int:
        """Experts active per token."""
        return min(self.run.top_k or len(self.experts), len(self.experts))

    @property
    def accumulation(self) -> int:
        """Microbatches of a step: plans are for accelerators, where the choice is 1."""
        return self.run.accumulation or 1

    def computed(self, groups: int) -> int:
        """Experts that a token runs through: all in training without an `expert` axis (`groups` is its size)."""
        sparse = self.kind != "train" or groups > 1
        return self.active if sparse else len(self.experts)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array among the program's arguments. `part`: trained, moments, counters, frozen, batch or cache."""

    part: str
    path: str
    shape: tuple[int, ...]
    itemsize: float
    spec: P


def params_shapes(work: Work) -> Params:
    """Shapes of the whole tree with named experts, float32. In training an owner's may be low-rank changes."""
    ranks = {work.run.owner: _ranks(work)} if work.kind == "train" else {}
    spec = model_leaves(work.model, work.experts, ranks)
    return unflatten({path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in spec.items()})


def _ranks(work: Work) -> dict[str, int]:
    """The ranks of what the owner trains: the run's, or those of the package that it goes on from, if it is there."""
    run = work.run
    if run.expert is not None and pathlib.Path(run.expert).exists():
        return all_ranks(read_manifest(run.expert).tensors)
    return {} if run.rank is None else read_ranks(run.rank, work.model)


def arguments(work: Work, groups: int) -> dict[str, Any]:
    """The program's arguments as trees of shapes; `groups` is the size of the `expert` axis."""
    return _arguments(_whole(work), groups)


def leaves(work: Work, groups: int) -> tuple[Leaf, ...]:
    """Every array of the arguments with its partition spec."""
    return _leaves(_whole(work), groups)


def _whole(work: Work) -> Work:
    """The same program without microbatches: they do not change its arguments."""
    return dataclasses.replace(work, run=dataclasses.replace(work.run, accumulation=1))


def _optimizer(work: Work) -> optax.GradientTransformation:
    return make_optimizer(work.run.optimizer, work.run.steps, work.experts)


@functools.lru_cache
def _arguments(work: Work, groups: int) -> dict[str, Any]:
    run, B, T = work.run, work.run.batch_size, work.run.seq_len
    if work.kind == "train":
        state, frozen = state_shapes(params_shapes(work), run, _optimizer(work), groups)
        return {"state": state, "frozen": frozen, "batch": Batch.shapes(B, T, own=run.public_sequences > 0)}
    params = params_shapes(work)
    params = {**params, "experts": stack_weights(params["experts"], groups)}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, work.dtype), params)
    row = jax.ShapeDtypeStruct((B,), jnp.int32)
    if work.kind == "prefill":
        return {"frozen": params, "batch": (jax.ShapeDtypeStruct((B, T), jnp.int32), row)}
    cache = jax.eval_shape(lambda: init_cache(work.model, B, T, work.dtype))
    return {"frozen": params, "batch": (row, row), "cache": cache}


@functools.lru_cache
def _leaves(work: Work, groups: int) -> tuple[Leaf, ...]:
    found = []
    for name, tree in _arguments(work, groups).items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            text = path_text(path)
            part = {"trainable": "trained", "opt_state": "moments"}.get(text.partition("/")[0], "counters")
            fixed = {"batch": BATCH_SPEC, "cache": CACHE_SPEC}.get(name)
            spec = leaf_spec(text, leaf.shape) if fixed is None else fixed
            itemsize = 0.5 if leaf.dtype == jnp.uint4 else leaf.dtype.itemsize  # two to a byte on an accelerator
            found.append(Leaf(part if name == "state" else name, text, leaf.shape, itemsize, spec))
    return tuple(found)


def lower(work: Work, mesh: Mesh) -> jax.stages.Lowered:
    """The program, traced and lowered for the devices of `mesh` from shapes only."""
    shapes, everywhere = arguments(work, mesh.shape[EXPERT]), replicated(mesh)
    shardings: dict[str, Any] = {
        name: tree_shardings(mesh, shapes[name]) for name in ("state", "frozen") if name in shapes
    }
    shardings |= {
        name: jax.tree.map(lambda _, spec=spec: NamedSharding(mesh, spec), shapes[name])
        for name, spec in (("batch", BATCH_SPEC), ("cache", CACHE_SPEC))
        if name in shapes
    }
    given = {
        name: jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes[name], shardings[name]
        )
        for name in shapes
    }
    with jax.set_mesh(mesh):
        if work.kind == "train":
            step: Any = make_train_step(work.model, work.run, (shardings["state"], everywhere), _optimizer(work))
            return step.lower(given["state"], given["frozen"], given["batch"])
        run = Decoder(work.model, work.run.top_k, "sparse", dtype=work.run.compute_dtype)
        key = jax.eval_shape(lambda: jax.random.key(0))
        if work.kind == "prefill":
            return first_token.lower(run, GREEDY, work.run.seq_len, given["frozen"], key, *given["batch"])
        return next_token.lower(run, GREEDY, given["frozen"], key, *given["batch"], given["cache"])
