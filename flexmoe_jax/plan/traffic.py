"""What devices send one another in a step: each kind of collective, where it comes from, and its bytes."""

import dataclasses
import math
from collections.abc import Mapping

from flexmoe_jax.model.loss import ACCELERATOR_CHUNKS
from flexmoe_jax.parallel.mesh import BATCH
from flexmoe_jax.parallel.specs import part_shape
from flexmoe_jax.params import AXES, DATA, EXPERT, FSDP, TENSOR
from flexmoe_jax.plan.work import Leaf, Work


@dataclasses.dataclass(frozen=True)
class Transfer:
    """`size` bytes that a device receives in a step, over `axes` of the mesh, from up to `apart` places away."""

    kind: str
    of: str
    axes: tuple[str, ...]
    count: int
    size: float
    apart: int


def transfers(
    work: Work, table: tuple[Leaf, ...], sizes: Mapping[str, int], n: int, passes: int
) -> tuple[Transfer, ...]:
    """Of one step; `n` tokens of a microbatch are on one device, `passes` go through the layers' weights.

    A device receives, of an array of S bytes that g devices share: all-gather and reduce-scatter S (g-1)/g, all-reduce
    twice that. Weights are gathered in compute dtype, gradients reduced in it, for every microbatch.
    """
    m, c, L = work.model, work.dtype.itemsize, work.model.num_layers
    times = work.run.accumulation if work.kind == "train" else 1
    found: list[Transfer] = []

    def add(kind: str, of: str, axes: tuple[str, ...], count: int, size: float) -> None:
        group = math.prod(sizes[axis] for axis in axes)
        share = (2 if kind == "all-reduce" else 1) * (group - 1) / group
        if share and size:
            # The axes after one lie between its neighbours.
            inner = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[0]) :])
            found.append(Transfer(kind, of, tuple(a for a in axes if sizes[a] > 1), count, count * size * share, inner))

    def held(leaf: Leaf, *whole: str) -> float:
        parts = {**dict(sizes), **dict.fromkeys(whole, 1)}
        return math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, parts)) * c

    weights = [leaf for leaf in table if leaf.part in ("trained", "frozen")]
    layers = [leaf for leaf in weights if leaf.path.rpartition("/")[2].startswith("w_")]
    head = "trunk/embed" if m.tie_embeddings else "trunk/head"
    add("all-gather", "layers' weights", (FSDP,), passes * L, sum(held(leaf, FSDP) for leaf in layers) / L)
    add("all-gather", "head", (FSDP,), times, sum(held(leaf, FSDP) for leaf in weights if leaf.path.endswith(head)))
    rows = n * m.d_model * c
    add("all-to-all", "embedded tokens", (FSDP,), times, rows)
    # A microbatch's activations: after attention and after every expert that runs by itself; the same on the way back.
    ways = passes if work.kind == "train" else 1
    named = work.kind == "train" and sizes[EXPERT] == 1
    branches = 1 + (len(work.experts) if named else 1)
    gathers = sizes[EXPERT]
    add("all-reduce", "layers' outputs", (TENSOR,), ways * L * branches, rows * (1 if named else (1 + gathers) / 2))
    if not named:
        add("all-gather", "tokens for experts", (EXPERT,), ways * L, rows * sizes[EXPERT])
        add("reduce-scatter", "experts' sums", (EXPERT,), ways * L, rows * sizes[EXPERT])
    if work.kind != "train":
        return tuple(found)
    add("all-reduce", "the head's derivative", (TENSOR,), times, rows)
    trained = [leaf for leaf in weights if leaf.part == "trained"]
    matrices = [leaf for leaf in trained if not leaf.path.endswith(head) and any(leaf.spec)]
    add("reduce-scatter", "gradients", (FSDP,), times, sum(held(leaf, FSDP) for leaf in matrices))
    stacked = [leaf for leaf in matrices if EXPERT in leaf.spec]
    add("all-reduce", "gradients of experts", (DATA,), times, sum(held(leaf) for leaf in stacked))
    others = sum(held(leaf) for leaf in matrices if leaf not in stacked)
    add("all-reduce", "gradients", (DATA, EXPERT), times, others)
    small = sum(held(leaf) for leaf in trained if not any(leaf.spec))
    add("all-reduce", "gradients of rows and norms", BATCH, times, small * 4 / c)
    # Added up chunk by chunk in float32, and reduced whole each time.
    gradient = sum(held(leaf, FSDP) * 4 / c for leaf in trained if leaf.path.endswith(head))
    add("all-reduce", "the head's gradient", BATCH, times * ACCELERATOR_CHUNKS, gradient)
    return tuple(found)
