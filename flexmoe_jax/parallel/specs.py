"""Shardings: ordered rules from paths to partition specs that cover every leaf of parameters, moments and batches.

Legend as in model/: L layers, E experts, D width, F feed-forward width, H heads, K head size, V vocabulary.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.parallel.mesh import BATCH
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.params import EXPERT_AXES, STACKED_AXES, TENSOR, TRUNK_AXES
from flexmoe_jax.tree import Params, match_rules

# Scalars, norms, router rows and biases are small and replicated; every matrix is split by fsdp and by tensor.
RULES: tuple[tuple[str, P], ...] = (
    *((f"trunk/{path}", P(*axes)) for path, axes in TRUNK_AXES.items()),
    *((f"experts/{STACKED}/{path}", P(*axes)) for path, axes in STACKED_AXES.items()),
    *((f"experts/[^/]+/{path}", P(*axes)) for path, axes in EXPERT_AXES.items()),
)
T = TypeVar("T")
BATCH_SPEC = P(BATCH)  # every array of a batch: the first axis is its rows
CACHE_SPEC = P(None, BATCH, TENSOR)  # keys and values [L, B, G, S, K]


def spec_of(path: str) -> P:
    """The partition spec of the leaf at `path` of the parameters, or of a state that holds trees like them.

    Moments, and a quantized matrix without its scales, are split like their parameters; scales and counters are
    replicated. FlexMoEError if no rule covers a parameter.
    """
    inside = re.search(r"(?:^|/)((?:trunk|experts)/.*?)(?:/qvalue)?$", path)
    if inside is None or path.endswith("/scale"):
        return P()
    return match_rules([inside[1]], RULES)[inside[1]]


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of the leaves of `tree` (arrays or shapes); ConfigError if the mesh cannot split a leaf evenly."""

    def sharding(path, leaf):
        spec = leaf_spec(path_text(path), leaf.shape)
        part_shape(path_text(path), leaf.shape, spec, mesh.shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def leaf_spec(path: str, shape: tuple[int, ...]) -> P:
    """`spec_of(path)`; moments with fewer axes than their parameter (factored) are small and replicated."""
    spec = spec_of(path)
    return P() if len(spec) > len(shape) else spec


def part_shape(path: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one device's part of a leaf, on mesh axes of these sizes; ConfigError if one does not divide it."""
    part = list(shape)
    for i, axes in enumerate(spec):
        parts = math.prod(sizes[name] for name in _names(axes))
        if part[i] % parts:
            raise ConfigError(
                f"{path} has an axis of {part[i]}, the mesh splits it into {parts} ({', '.join(_names(axes))})",
                "choose mesh sizes that divide the model's",
            )
        part[i] //= parts
    return tuple(part)


def place(mesh: Mesh, tree: Params, dtype: npt.DTypeLike | None = None) -> Params:
    """The leaves of `tree` (anything that is sliced like a NumPy array) on the devices of all processes.

    A process reads only what its own devices hold: leaves may be memory-mapped files. Leaves that are on the mesh
    already are copied. `dtype` converts. ConfigError if the mesh cannot split a leaf evenly.
    """
    return jax.tree.map(lambda leaf, sharding: place_leaf(leaf, sharding, dtype), tree, tree_shardings(mesh, tree))


def place_at(mesh: Mesh, path: str, leaf: Any, dtype: npt.DTypeLike | None = None) -> jax.Array:
    """The leaf at `path` of a parameter tree on the mesh, as `place` does; ConfigError if it cannot be split."""
    spec = leaf_spec(path, leaf.shape)
    part_shape(path, leaf.shape, spec, mesh.shape)
    return place_leaf(leaf, NamedSharding(mesh, spec), dtype)


def place_leaf(leaf: Any, sharding: NamedSharding, dtype: npt.DTypeLike | None = None) -> jax.Array:
    """One leaf with this sharding, made from the slices that this process's devices hold; `dtype` converts."""
    dtype = np.dtype(dtype or leaf.dtype)
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return jax.jit(lambda a: jnp.array(a, dtype, copy=True), out_shardings=sharding)(leaf)
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: np.asarray(leaf[index]).astype(dtype), dtype=dtype
    )


def place_batch(mesh: Mesh, batch: T) -> T:
    """A tree of arrays, which every process holds whole, with its rows split over the devices.

    ConfigError if the number of rows is not a multiple of `batch_parts(mesh)`.
    """
    check_rows(mesh, len(jax.tree.leaves(batch)[0]))
    return jax.tree.map(lambda array: place_leaf(array, NamedSharding(mesh, BATCH_SPEC)), batch)


def check_rows(mesh: Mesh, rows: int) -> None:
    """ConfigError if a batch of `rows` rows cannot be split evenly over the devices of `mesh`."""
    parts = batch_parts(mesh)
    if rows % parts:
        raise ConfigError(
            f"a batch of {rows} rows is split over {parts} devices ({' x '.join(BATCH)})",
            f"choose a batch that is a multiple of {parts}",
        )


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH)


def path_text(path: tuple) -> str:
    """A JAX key path as `a/b/0/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
