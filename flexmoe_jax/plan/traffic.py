"""What a device receives from others in one step: one numbered term for each collective.

Of an array of S bytes, a device in a group of g receives S (g-1)/g by an all-gather, a reduce-scatter or an all-to-all,
and twice that by an all-reduce. Letters as in costs.py (per device), and: e devices on the `expert` axis, N experts,
a microbatches, p passes through the layers' weights, R = n D c bytes of one activation of a microbatch. Weights are
gathered, and gradients reduced, in compute dtype and once per microbatch.

        collective      of                           over                 times      S
     1  all-gather      layers' weights              fsdp                 p L        one layer's matrices
     2  all-gather      head                         fsdp                 a          the head
     3  all-to-all      embedded tokens              fsdp                 a          R
     4  all-reduce      layers' outputs              tensor               p L (1+N)  R: of attention, of each expert
     5  all-gather      tokens for experts           expert               p L        e R
     6  reduce-scatter  experts' sums                expert               p L        e R
     7  all-reduce      the head's derivative        tensor               a          R
     8  reduce-scatter  gradients                    fsdp                 a          trained matrices but the head
     9  all-reduce      gradients of experts         data                 a          this device's part of experts
    10  all-reduce      gradients                    data, expert         a          this device's part of the others
    11  all-reduce      gradients of rows and norms  data, fsdp, expert   a          trained vectors, in float32
    12  all-reduce      the head's gradient          data, fsdp, expert   a chunks   the head, in float32

1-6 are of every program, 7-12 only of training. Training on a mesh without `expert` computes each expert by itself,
without 5 and 6. Everything else dispatches tokens to experts: 4 is then p L times R, of attention, and p L times e R,
of the experts. The head's gradient is summed chunk by chunk and reduced whole after each.
"""

import dataclasses
import math
from collections.abc import Mapping

from flexmoe_jax.model.loss import ACCELERATOR_CHUNKS
from flexmoe_jax.parallel.mesh import BATCH
from flexmoe_jax.parallel.specs import part_shape
from flexmoe_jax.params import AXES, DATA, EXPERT, FSDP, TENSOR, is_matrix
from flexmoe_jax.plan.work import Leaf, Work


@dataclasses.dataclass(frozen=True)
class Transfer:
    """`size` bytes that a device receives per step, in `count` collectives over `axes` of the mesh.

    The devices of one collective span `apart` neighboring devices.
    """

    kind: str
    of: str
    axes: tuple[str, ...]
    count: int
    size: float
    apart: int


def transfers(
    work: Work, table: tuple[Leaf, ...], sizes: Mapping[str, int], n: int, passes: int
) -> tuple[Transfer, ...]:
    """The transfers of one step on a mesh of these axis sizes; those that take no bytes are left out.

    `table` holds the program's arguments (work.py `leaves`), `n` counts the tokens of a microbatch on one device,
    `passes` how often a step goes through the layers' weights.
    """
    m, c, L = work.model, work.dtype.itemsize, work.model.num_layers
    times = work.accumulation if work.kind == "train" else 1
    found: list[Transfer] = []

    def add(kind: str, of: str, axes: tuple[str, ...], count: int, size: float) -> None:
        group = math.prod(sizes[axis] for axis in axes)
        share = (2 if kind == "all-reduce" else 1) * (group - 1) / group
        if share and size:
            # Devices that are neighbors on an axis are as far apart as the later axes together are wide.
            inner = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[0]) :])
            found.append(Transfer(kind, of, tuple(a for a in axes if sizes[a] > 1), count, count * size * share, inner))

    def held(leaf: Leaf, *whole: str) -> float:
        parts = {**dict(sizes), **dict.fromkeys(whole, 1)}
        return math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, parts)) * c

    weights = [leaf for leaf in table if leaf.part in ("trained", "frozen")]
    layers = [leaf for leaf in weights if is_matrix(leaf.path)]
    head = "trunk/embed" if m.tie_embeddings else "trunk/head"
    whole_head = sum(held(leaf, FSDP) for leaf in weights if leaf.path.endswith(head))
    rows = n * m.d_model * c
    one_by_one = work.kind == "train" and sizes[EXPERT] == 1
    outputs = 1 + (len(work.experts) if one_by_one else 1)
    mean = rows * (1 if one_by_one else (1 + sizes[EXPERT]) / 2)
    add("all-gather", "layers' weights", (FSDP,), passes * L, sum(held(leaf, FSDP) for leaf in layers) / L)  # 1
    add("all-gather", "head", (FSDP,), times, whole_head)  # 2
    add("all-to-all", "embedded tokens", (FSDP,), times, rows)  # 3
    add("all-reduce", "layers' outputs", (TENSOR,), passes * L * outputs, mean)  # 4
    if not one_by_one:
        add("all-gather", "tokens for experts", (EXPERT,), passes * L, rows * sizes[EXPERT])  # 5
        add("reduce-scatter", "experts' sums", (EXPERT,), passes * L, rows * sizes[EXPERT])  # 6
    if work.kind != "train":
        return tuple(found)
    trained = [leaf for leaf in weights if leaf.part == "trained"]
    matrices = [leaf for leaf in trained if not leaf.path.endswith(head) and any(leaf.spec)]
    stacked = [leaf for leaf in matrices if EXPERT in leaf.spec]
    others = sum(held(leaf) for leaf in matrices if leaf not in stacked)
    vectors = sum(held(leaf) for leaf in trained if not any(leaf.spec)) * 4 / c
    trained_head = sum(held(leaf, FSDP) * 4 / c for leaf in trained if leaf.path.endswith(head))
    add("all-reduce", "the head's derivative", (TENSOR,), times, rows)  # 7
    add("reduce-scatter", "gradients", (FSDP,), times, sum(held(leaf, FSDP) for leaf in matrices))  # 8
    add("all-reduce", "gradients of experts", (DATA,), times, sum(held(leaf) for leaf in stacked))  # 9
    add("all-reduce", "gradients", (DATA, EXPERT), times, others)  # 10
    add("all-reduce", "gradients of rows and norms", BATCH, times, vectors)  # 11
    add("all-reduce", "the head's gradient", BATCH, times * ACCELERATOR_CHUNKS, trained_head)  # 12
    return tuple(found)
