"""Memory, operations and time that a program takes of each device of a mesh, estimated from shapes.

Sizes are bytes of one device. Letters of the formulas: n tokens and b rows of a microbatch on one device, T tokens of a
row, c bytes of an activation, t devices on the `tensor` axis, E experts that a token runs through; L layers, D width,
F feed-forward width, V vocabulary, H heads, G key-value heads, K head size.
"""

import dataclasses
import math
from collections.abc import Mapping

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.attention import block_length
from flexmoe_jax.model.flops import products, step_flops
from flexmoe_jax.model.loss import ACCELERATOR_CHUNKS
from flexmoe_jax.parallel.chips import Topology
from flexmoe_jax.parallel.mesh import BATCH
from flexmoe_jax.parallel.specs import part_shape
from flexmoe_jax.params import EXPERT, FSDP, TENSOR, is_matrix
from flexmoe_jax.plan.traffic import Transfer, transfers
from flexmoe_jax.plan.work import Leaf, Work, leaves

# Share of the peak FLOP/s that products attain, recomputation included. MaxText reports 52.6% (Mixtral 8x7B, 256 v5p),
# 65.4% (Llama2-70B, v5p), 35.2% and 45.5% (Mixtral 8x7B, Llama3.1-8B; v6e) without it: its README, 2025.
ATTAINABLE = 0.5
# Share of a chip's memory. The runtime, fragmentation and what the estimate misses take the rest.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Costs:
    """One device's part of one step.

    `sizes` are the axes of the mesh, `memory` bytes by purpose, `memory_traffic` bytes read and written, `seconds` the
    times of compute, memory and communication, `usable` the bytes that a device has for the program.
    """

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
        """Bytes in all."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the program fits in a device's memory."""
        return self.total <= self.usable

    @property
    def step_seconds(self) -> float:
        """The longer of compute and memory, plus communication: no overlap is assumed."""
        return max(self.seconds["compute"], self.seconds["memory"]) + self.seconds["communication"]


def estimate(work: Work, topology: Topology, sizes: Mapping[str, int]) -> Costs:
    """The costs on a mesh of these axis sizes. Raises ConfigError where it does not divide the model or the batch."""
    table = leaves(work, sizes[EXPERT])
    memory: dict[str, float] = {}
    for leaf in table:
        part = "moments" if leaf.part == "counters" else leaf.part
        memory[part] = memory.get(part, 0) + part_bytes(leaf, sizes)
    tokens = tokens_of(work, sizes)
    weights = gathered(work, table, sizes)
    if work.kind == "train":
        # In compute dtype a copy of trained weights and one microbatch's gradients, in float32 the gradients' sum.
        trained = memory.get("trained", 0)
        half = trained * work.dtype.itemsize / 4
        memory["weights as used"] = half if work.dtype.itemsize < 4 else 0.0
        memory["gradients"] = trained + half if work.accumulation > 1 else trained
    if work.kind == "train" and work.run.frozen_dtype:
        # Those of one layer, in float32 and in the compute dtype.
        blocks = tuple(leaf for leaf in table if leaf.path.endswith("/qvalue"))
        layer = gathered(work, blocks, sizes) / work.model.num_layers
        memory["dequantized weights"] = layer * (1 + 4 / work.dtype.itemsize)
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


def part_bytes(leaf: Leaf, sizes: Mapping[str, int]) -> float:
    """Bytes of one array on one device."""
    return math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, sizes)) * leaf.itemsize


def tokens_of(work: Work, sizes: Mapping[str, int]) -> int:
    """n: the tokens of one microbatch on one device. Raises ConfigError where the mesh does not divide the rows."""
    rows, parts = work.run.batch_size, math.prod(sizes[name] for name in BATCH)
    if work.kind == "train":
        rows //= work.accumulation
    if rows % parts:
        raise ConfigError(
            f"a microbatch of {rows} rows is split over {parts} devices ({' x '.join(BATCH)})",
            f"choose config.batch_size and config.accumulation so that microbatches are multiples of {parts} rows",
        )
    return rows // parts * (1 if work.kind == "decode" else work.run.seq_len)


def weight_passes(work: Work) -> int:
    """How often a step goes through the layers' weights: forward, recomputation and backward, for each microbatch."""
    return work.accumulation * (3 if work.run.remat else 2) if work.kind == "train" else 1


def gathered(work: Work, table: tuple[Leaf, ...], sizes: Mapping[str, int]) -> float:
    """Bytes of the layers' matrices as a device reads them: gathered over `fsdp`, in compute dtype."""
    parts = {**dict(sizes), FSDP: 1}
    held = [
        leaf for leaf in table if leaf.part in ("trained", "frozen") and is_matrix(leaf.path.removesuffix("/qvalue"))
    ]
    return sum(math.prod(part_shape(leaf.path, leaf.shape, leaf.spec, parts)) for leaf in held) * work.dtype.itemsize


def activations(work: Work, n: int, sizes: Mapping[str, int]) -> float:
    """Bytes of activations at the peak of a step.

        layer     n c (6 D + (3 H + 2 G) K / t + E (D + w F / t))      kept by one layer for the backward pass; w = 2,
                  or 4 where sparse experts train: the grouped products keep every array
        work      n c 4 F / t + 12 b H / t (T / 8) T                   the largest temporaries: feed-forward, scores
        kept      L layer, or L n c D with remat
        head      n / 8 V / t (4 + 4 + c), and 4 D V / t for the gradient of a trained head
        training  kept + max(layer + work, head)
        prefill   max(layer + scores of work, logits), and the cache it makes
        decode    the same for one token of every row; it writes a new cache beside the one it reads

    Sparse experts hold the n E slots of all devices on the `expert` axis.
    """
    m, c, t = work.model, work.dtype.itemsize, sizes[TENSOR]
    T = work.run.seq_len
    rows = n if work.kind == "decode" else n // T
    E = work.computed(sizes[EXPERT]) * (sizes[EXPERT] if work.kind != "train" or sizes[EXPERT] > 1 else 1)
    heads = (3 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim / t
    wide = 4 if work.kind == "train" and sizes[EXPERT] > 1 else 2
    layer = n * c * (6 * m.d_model + heads + E * (m.d_model + wide * m.d_ff / t))
    block = 1 if work.kind == "decode" else block_length(T)
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
    """Whether the output head (the embedding, where they are tied) is trained."""
    name = "trunk/embed" if work.model.tie_embeddings else "trunk/head"
    return any(leaf.part == "trained" and leaf.path.endswith(name) for leaf in leaves(work, sizes[EXPERT]))


def _is_ffn(leaf: Leaf) -> bool:
    inside = "experts/" in leaf.path and "/w_" in leaf.path and not leaf.path.endswith("/scale")
    return leaf.part in ("trained", "frozen") and inside


def flops(work: Work, sizes: Mapping[str, int]) -> tuple[float, float]:
    """(needed, computed) operations of one device; `needed` counts active experts only, and no recomputation."""
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
    ffns = {leaf.path: math.prod(leaf.shape) for leaf in leaves(work, sizes[EXPERT]) if _is_ffn(leaf)}
    part = sum(size for path, size in ffns.items() if path in trained) / sum(ffns.values())

    def step(experts: float, again: int) -> float:
        trains = {"head": head_trains(work, sizes), "attention": body, "expert": experts * part}
        once_more = again * (p["attention"] + p["scores"] + experts * p["expert"])
        return tokens * (step_flops(work.model, work.run.seq_len, experts, trains) + once_more) / devices

    return step(work.active, 0), step(computed, int(work.run.remat))
