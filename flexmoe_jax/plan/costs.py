"""What a program takes of each device of a mesh, by arithmetic. Sizes are bytes of one device.

Letters of the formulas, all of one device: n tokens of a microbatch, c bytes of an activation, t the `tensor` axis;
L, D, F, V, H, G, K are the model's, E the experts that a token runs through, b rows of a microbatch.
"""

import dataclasses
import math
from collections.abc import Mapping

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.attention import BLOCKS, MIN_BLOCK
from flexmoe_jax.model.flops import products, step_flops
from flexmoe_jax.model.loss import ACCELERATOR_CHUNKS
from flexmoe_jax.parallel.chips import Topology
from flexmoe_jax.parallel.mesh import BATCH
from flexmoe_jax.parallel.specs import part_shape
from flexmoe_jax.params import EXPERT, FSDP, TENSOR
from flexmoe_jax.plan.traffic import Transfer, transfers
from flexmoe_jax.plan.work import Leaf, Work, leaves

# Of the peak, on all that is computed, recomputation included. MaxText reports 52.6% (Mixtral 8x7B, 256 v5p), 65.4%
# (Llama2-70B, v5p), 35.2% and 45.5% (Mixtral 8x7B, Llama3.1-8B; v6e) of it on what a model needs: its README, 2025.
ATTAINABLE = 0.5
# Of a chip's memory. The rest is for what the runtime keeps, for fragments, and for what the estimate misses.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Costs:
    """One device's part of one step: bytes by what they are for, operations, transfers, seconds."""

    sizes: Mapping[str, int]
    memory: Mapping[str, float]
    needed_flops: float
    computed_flops: float
    memory_traffic: float
    transfers: tuple[Transfer, ...]
    seconds: Mapping[str, float]
    usable: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    @property
    def step_seconds(self) -> float:
        """Nothing is taken to overlap: products or memory, whichever is longer, and then communication."""
        return max(self.seconds["compute"], self.seconds["memory"]) + self.seconds["communication"]


def estimate(work: Work, topology: Topology, sizes: Mapping[str, int]) -> Costs:
    """The costs on a mesh of these axis sizes; ConfigError where something does not divide."""
    table = leaves(work, sizes[EXPERT])
    memory: dict[str, float] = {}
    for leaf in table:
        part = "moments" if leaf.part == "counters" else leaf.part
        memory[part] = memory.get(part, 0) + part_bytes(leaf, sizes)
    tokens = tokens_of(work, sizes)
    weights = gathered(work, table, sizes)
    if work.kind == "train":
        # A copy of what is trained and the gradients of one microbatch in compute dtype, and their sum.
        trained = memory.get("trained", 0)
        half = trained * work.dtype.itemsize / 4
        memory["weights as used"] = half if work.dtype.itemsize < 4 else 0.0
        memory["gradients"] = trained + half if work.run.accumulation > 1 else trained
    memory["gathered weights"] = 2 * weights / work.model.num_layers if sizes[FSDP] > 1 else 0.0
    memory["activations"] = activations(work, tokens, sizes)
    needed, computed = flops(work, sizes)
    passes = weight_passes(work)
    traffic = passes * weights + memory.get("cache", 0) + 2 * (memory.get("trained", 0) + memory.get("moments", 0))
    moved = transfers(work, table, sizes, tokens, passes)
    times = {
        "compute": computed / (topology.chip.peak * ATTAINABLE),
        "memory": traffic / topology.chip.bandwidth,
        "communication": sum(t.size / topology.speed(t.apart) for t in moved),
    }
    usable = USABLE * topology.chip.memory
    return Costs(dict(sizes), memory, needed, computed, traffic, moved, times, usable)


def part_bytes(leaf: Leaf, sizes: Mapping[str, int]) -> int:
    """Of one array on one device."""
    return math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, sizes)) * leaf.itemsize


def tokens_of(work: Work, sizes: Mapping[str, int]) -> int:
    """n: tokens of one microbatch on one device; ConfigError where rows do not divide."""
    rows, parts = work.run.batch_size, math.prod(sizes[name] for name in BATCH)
    if work.kind == "train":
        rows //= work.run.accumulation
    if rows % parts:
        raise ConfigError(
            f"a microbatch of {rows} rows is split over {parts} devices ({' x '.join(BATCH)})",
            f"choose config.batch_size and config.accumulation so that microbatches are multiples of {parts} rows",
        )
    return rows // parts * (1 if work.kind == "decode" else work.run.seq_len)


def weight_passes(work: Work) -> int:
    """How often a step goes through the layers' weights: forward, backward, and recomputation, of each microbatch."""
    return work.run.accumulation * (3 if work.run.remat else 2) if work.kind == "train" else 1


def gathered(work: Work, table: tuple[Leaf, ...], sizes: Mapping[str, int]) -> float:
    """Layers' weights as a device reads them: gathered from `fsdp`, in compute dtype."""
    parts = {**dict(sizes), FSDP: 1}
    held = [leaf for leaf in table if leaf.part in ("trained", "frozen") and leaf.path.split("/")[-1].startswith("w_")]
    return sum(math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, parts)) for leaf in held) * work.dtype.itemsize


def activations(work: Work, n: int, sizes: Mapping[str, int]) -> float:
    """Of a step at its fullest.

        layer     n c (6 D + (3 H + 2 G) K / t + E (D + w F / t))      what one layer keeps for its derivative; w = 2,
                  or 4 where sparse experts train: the grouped products keep every array
        work      n c 4 F / t + 12 b H / t (T / 8) T                   the largest of what it computes with
        kept      L layer, or L n c D with remat
        head      n / 8 V / t (4 + 4 + c), and 4 D V / t for the gradient of a trained head
        training  kept + max(layer + work, head)
        prefill   layer + the scores' part of work, and the cache it begins
        decode    the same of one token of every row; the cache it writes is another beside the one it was given

    Sparse experts take n E slots of all the devices of their group.
    """
    m, c, t = work.model, work.dtype.itemsize, sizes[TENSOR]
    T = work.run.seq_len
    rows = n if work.kind == "decode" else n // T
    E = work.computed(sizes[EXPERT]) * (sizes[EXPERT] if work.kind != "train" or sizes[EXPERT] > 1 else 1)
    heads = (3 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim / t
    wide = 4 if work.kind == "train" and sizes[EXPERT] > 1 else 2
    layer = n * c * (6 * m.d_model + heads + E * (m.d_model + wide * m.d_ff / t))
    block = 1 if work.kind == "decode" else max(T // BLOCKS, min(MIN_BLOCK, T))
    scores = 12.0 * rows * m.num_heads / t * block * T
    if work.kind != "train":
        logits = 8.0 * rows * m.vocab_size / t
        cache = 2.0 * c * rows * m.num_kv_heads / t * T * m.head_dim * m.num_layers
        return max(layer + scores, logits) + cache
    inside = n * c * 4 * m.d_ff / t + scores
    kept = m.num_layers * (n * c * m.d_model if work.run.remat else layer)
    head = n / ACCELERATOR_CHUNKS * m.vocab_size / t * (8 + c)
    if head_trains(work, sizes):
        head += 4.0 * m.d_model * m.vocab_size / t
    return kept + max(layer + inside, head)


def head_trains(work: Work, sizes: Mapping[str, int]) -> bool:
    name = "trunk/embed" if work.model.tie_embeddings else "trunk/head"
    return any(leaf.part == "trained" and leaf.path.endswith(name) for leaf in leaves(work, sizes[EXPERT]))


def flops(work: Work, sizes: Mapping[str, int]) -> tuple[float, float]:
    """(needed, computed) of one device: the first without recomputation, and of chosen experts alone."""
    p = products(work.model, 2 * work.run.seq_len if work.kind == "decode" else work.run.seq_len)
    devices = math.prod(sizes.values())
    tokens = work.run.batch_size * (1 if work.kind == "decode" else work.run.seq_len)
    computed = work.computed(sizes[EXPERT])
    if work.kind != "train":
        layers = p["attention"] + p["scores"] + work.active * p["expert"]
        whole = tokens * layers + work.run.batch_size * p["head"]
        return whole / devices, whole / devices
    trained = {leaf.path for leaf in leaves(work, sizes[EXPERT]) if leaf.part == "trained"}
    body = any("trunk/blocks/w_" in path for path in trained)
    ffns = sum(path.endswith("/w_up") for path in trained)
    part = 1.0 if any("/stacked/" in path for path in trained) else ffns / len(work.experts)

    def step(experts: float, again: int) -> float:
        trains = {"head": head_trains(work, sizes), "attention": body, "expert": experts * part}
        once_more = again * (p["attention"] + p["scores"] + experts * p["expert"])
        return tokens * (step_flops(work.model, work.run.seq_len, experts, trains) + once_more) / devices

    return step(work.active, 0), step(computed, int(work.run.remat))
