"""The state of a training run: trainable leaves with their moments, counters, and the frozen leaves beside it."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.flops import step_flops
from flexmoe_jax.model.quantized import quantize, quantized_shapes
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.specs import leaf_spec, path_text, place, place_at, place_leaf, tree_shardings
from flexmoe_jax.parallel.stacked import STACKED, restack_weights, stack_weights, unstack_weights
from flexmoe_jax.params import EXPERT, FFN_WEIGHTS, FSDP, is_float32, is_matrix
from flexmoe_jax.training.freezing import freezing_mask
from flexmoe_jax.tree import Params, flatten, partition


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. Counters, int32: `step` batches, `bad_steps` skipped updates in a row, `skipped`
    in total."""

    step: jax.Array
    trainable: Params
    opt_state: Any
    bad_steps: jax.Array
    skipped: jax.Array


def flops_per_token(model: ModelConfig, run: RunConfig, params: Params) -> float:
    """Model FLOPs per token of a step of `run` (model/flops.py), by what it trains.

    Assumes that every expert gets the same number of tokens.
    """
    trainable, _ = partition(params, freezing_mask(params, run.owner, run.freeze))

    def share(pattern: str) -> float:
        sizes = [
            sum(math.prod(leaf.shape) for path, leaf in flatten(tree).items() if re.fullmatch(pattern, path))
            for tree in (trainable, params)
        ]
        return sizes[0] / sizes[1]

    active = min(run.top_k or len(params["experts"]), len(params["experts"]))
    trained = {
        "head": share("trunk/embed" if model.tie_embeddings else "trunk/head"),
        "attention": share("trunk/blocks/w_.*"),
        "expert": active * share("experts/[^/]*/w_.*"),
    }
    return step_flops(model, run.seq_len, active, trained)


def create_state(
    mesh: Mesh, params: Params, run: RunConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Params]:
    """(TrainState, frozen leaves) of a step of `run`: trainable leaves are float32 and have moments.

    Frozen ones are those of `place_frozen`. Every leaf is a copy, since the state is donated, split over the mesh by
    the rules of parallel/specs.py. If the mesh splits experts, their weights are stacked (parallel/stacked.py) with
    equal numbers of slots on its devices. ConfigError if the mesh cannot split the model.
    """
    trainable, frozen = split_state(params, run, mesh.shape[EXPERT])
    trainable = place(mesh, trainable, jnp.float32)
    frozen = place_frozen(mesh, frozen, run)
    shardings = state_shardings(mesh, trainable, optimizer)
    moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    counters = [place_leaf(np.zeros((), np.int32), shardings.step) for _ in range(3)]
    return TrainState(counters[0], trainable, moments, *counters[1:]), frozen


def place_frozen(mesh: Mesh, frozen: Params, run: RunConfig) -> Params:
    """Frozen leaves on the mesh: float32 where the model rounds them to no other dtype (`params.is_float32`), since
    scoring uses them so, too; matrices in `run.frozen_dtype`, if it has one; all others in the compute dtype.

    ConfigError if the mesh cannot split a leaf.
    """

    def put(path: tuple, leaf: Any) -> Any:
        if not (run.frozen_dtype and is_matrix(path_text(path))):
            return place_at(mesh, path_text(path), leaf, _frozen_dtype(path, run))
        blocks = quantize(leaf, run.frozen_dtype)
        return jax.tree_util.tree_map_with_path(lambda part, x: place_at(mesh, path_text((*path, *part)), x), blocks)

    return jax.tree_util.tree_map_with_path(put, frozen)


def state_shapes(
    params: Params, run: RunConfig, optimizer: optax.GradientTransformation, groups: int = 1
) -> tuple[TrainState, Params]:
    """The shapes of the result of `create_state` for parameters of these shapes; allocates nothing.

    `groups` is the size of the mesh's `expert` axis. ConfigError as of `split_state`.
    """
    trainable, frozen = split_state(params, run, groups)
    trainable = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), trainable)

    def freeze_leaf(path, leaf):
        if run.frozen_dtype and is_matrix(path_text(path)):
            return quantized_shapes(leaf, run.frozen_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, _frozen_dtype(path, run))

    frozen = jax.tree_util.tree_map_with_path(freeze_leaf, frozen)
    return _initial_shapes(trainable, optimizer), frozen


def state_shardings(mesh: Mesh, trainable: Any, optimizer: optax.GradientTransformation) -> Any:
    """The sharding of every leaf of the `TrainState` of `trainable` (arrays or shapes).

    ConfigError if the mesh cannot split a leaf.
    """
    return tree_shardings(mesh, _initial_shapes(trainable, optimizer))


def _frozen_dtype(path: tuple, run: RunConfig) -> np.dtype:
    return jnp.dtype(jnp.float32 if is_float32(path_text(path)) else run.compute_dtype)


def _initial_shapes(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    def initial(trainable):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trainable, optimizer.init(trainable), zero, zero)

    return jax.eval_shape(initial, trainable)


def split_state(params: Params, run: RunConfig, groups: int) -> tuple[Params, Params]:
    """(trainable leaves, frozen leaves); several experts on an `expert` axis of `groups` > 1 are stacked.

    ConfigError if some experts' feed-forward networks are trained and others frozen, or some whole and others low-rank
    changes, or frozen ones quantized: they cannot be stacked.
    """
    trainable, frozen = partition(params, freezing_mask(params, run.owner, run.freeze))
    if groups == 1 or len(params["experts"]) == 1:
        return trainable, frozen
    if low := [name for name, leaves in params["experts"].items() if not {*FFN_WEIGHTS} <= {*leaves}]:
        what = f"the mesh splits experts ({EXPERT}={groups}), of which {', '.join(low)} is a low-rank change"
        raise ConfigError(what, f"set {EXPERT}=1: two experts need no expert axis")
    if run.frozen_dtype:
        what = f"config.frozen_dtype is {run.frozen_dtype!r}, and the mesh splits experts ({EXPERT}={groups})"
        raise ConfigError(what, f"set {EXPERT}=1: two experts need no expert axis")
    names = set(params["experts"])
    for part in (trainable, frozen):
        held = {name for name, leaves in part.get("experts", {}).items() if "w_up" in leaves}
        if held not in (set(), names):
            raise ConfigError(
                f"the mesh splits experts ({EXPERT}={groups}), of which {', '.join(sorted(held))} are "
                "trained and others frozen, or the reverse",
                f"train all feed-forward networks or none, or set {EXPERT}=1: two experts need no expert axis",
            )
    trainable, frozen = (
        {**part, **({"experts": stack_weights(part["experts"], groups)} if "experts" in part else {})}
        for part in (trainable, frozen)
    )
    return trainable, frozen


def shapes_by_name(tree: Any, names: Sequence[str]) -> Any:
    """The shape, dtype and sharding of every leaf of `by_name(tree, names)`; leaves that are not stacked are arrays."""

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
        text = f"experts/{path_text(path)}"
        spec, parts = leaf_spec(text, leaf.shape), mesh.shape[FSDP] * mesh.shape[EXPERT]
        # No device holds more of the named leaves than of the stacked one, where their size allows it.
        wide = [(FSDP, EXPERT) if axes == FSDP and leaf.shape[i] % parts == 0 else axes for i, axes in enumerate(spec)]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*wide)))

    def shapes(node: Any) -> Any:
        if not _is_stacked(node):
            return node
        named = jax.eval_shape(functools.partial(unstack_weights, names=names), node)
        mesh = jax.tree.leaves(node)[0].sharding.mesh
        return jax.tree_util.tree_map_with_path(functools.partial(describe, mesh=mesh), named)

    return jax.tree.map(shapes, tree, is_leaf=_is_stacked)


def by_name(tree: Any, names: Sequence[str]) -> Any:
    """Trainable leaves, or an optimizer's state that mirrors them, with experts by name: the same on every mesh.

    This is the form of checkpoints. `names` are those of all experts of the run.
    """

    def unstack(node: Any, shapes: Any) -> Any:
        if not _is_stacked(node):
            return node
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        return jax.jit(unstack_weights, static_argnums=1, out_shardings=shardings)(node, tuple(names))

    return jax.tree.map(unstack, tree, shapes_by_name(tree, names), is_leaf=_is_stacked)


def as_stacked(named: Any, like: Any) -> Any:
    """The inverse of `by_name`: `named` in the form of `like`, a tree of arrays with their shardings."""

    def stack(node: Any, named: Any) -> Any:
        if not _is_stacked(node):
            return named
        shardings = jax.tree.map(lambda leaf: leaf.sharding, node)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), node)
        return jax.jit(functools.partial(restack_weights, like=shapes), out_shardings=shardings)(named)

    return jax.tree.map(stack, like, named, is_leaf=_is_stacked)


def _is_stacked(node: Any) -> bool:
    return isinstance(node, dict) and STACKED in node
