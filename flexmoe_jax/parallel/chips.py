"""Accelerators as their makers describe them, and the sizes that they come in."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from flexmoe_jax.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; a chip without `slices` cannot be planned for, and only its peak is known.

    `device_kinds` are its names in JAX. `peak` counts dense bfloat16 FLOP/s, `memory` bytes, `bandwidth` bytes/s of
    memory. `link` is bytes/s received over all links to its neighbors. GPUs come in machines of `group`, and receive
    `network` bytes/s from other machines. `slices` are the topologies it comes in.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak: float
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    slices: tuple[str, ...] = ()
    group: int = 0
    network: float = 0.0

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU: libtpu compiles for those on any machine."""
        return self.device_kinds[0].startswith("TPU")


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024")

# Makers add up both directions of an interconnect: half of that is received.
_TABLE = (
    # cloud.google.com/tpu/docs/v4: 275 TFLOPs
    Chip("v4", ("TPU v4",), 275e12),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, interconnect 400 GBps in both directions
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, 200e9, _FLAT),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GB, 2765 GBps, interconnect 4800 Gbps (v5e's: 1600 Gbps)
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95e9, 2765e9, 600e9, _CUBES),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, interconnect 800 GBps in both directions
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1638e9, 400e9, _FLAT),
    # NVIDIA A100 datasheet (SXM): 312 TFLOPs
    Chip("a100", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    # GeForce RTX 4070: 466 TFLOPs in FP8 with sparsity; bfloat16 added in float32 has an eighth of that (Ada GPU
    # architecture whitepaper, table 2, of the RTX 4090: 1,321 and 165); 12 GB, 504 GB/s; no NVLink
    Chip("rtx4070", ("NVIDIA GeForce RTX 4070",), 58e12, 12e9, 504e9, slices=("1",)),
    # NVIDIA L4 datasheet: 242 TFLOPs with sparsity, half without; 24 GB, 300 GB/s; no NVLink
    Chip("l4", ("NVIDIA L4",), 121e12, 24e9, 300e9, slices=("1",)),
    # NVIDIA L40S datasheet: 362 TFLOPs without sparsity; 48 GB, 864 GB/s; no NVLink
    Chip("l40s", ("NVIDIA L40S",), 362e12, 48e9, 864e9, slices=("1",)),
    # NVIDIA H100 datasheet (PCIe): 1,513 TFLOPs with sparsity, half without
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12),
    # nvidia.com/en-us/data-center/h100 (SXM): 1,979 TFLOPs with sparsity, half without; 80 GB, 3.35 TB/s, NVLink
    # 900 GB/s. Between machines 400 Gb/s for each GPU: docs.nvidia.com/dgx/dgxh100-user-guide.
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, 450e9, _GPUS, group=8, network=50e9),
    # nvidia.com/en-us/data-center/h200 (SXM): the H100's, except 141 GB and 4.8 TB/s
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, _GPUS, group=8, network=50e9),
)
CHIPS = {chip.name: chip for chip in _TABLE if chip.slices}  # those that can be planned for
PEAK_FLOPS = {kind: chip.peak for chip in _TABLE for kind in chip.device_kinds}


def peak_flops(devices: int) -> float | None:
    """Peak FLOP/s (dense bfloat16) of `devices` devices of this machine's kind; None where the kind is unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices


@dataclasses.dataclass(frozen=True)
class Topology:
    """Connected chips: `v5p:4x4x4`, `h100:8`."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        """As `--topology` takes it."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def count(self) -> int:
        """Number of chips."""
        return math.prod(int(side) for side in self.shape.split("x"))

    def speed(self, apart: int) -> float:
        """Bytes/s that a chip receives from the other members of a mesh axis, which span `apart` neighboring chips."""
        return self.chip.network if self.chip.group and apart > self.chip.group else self.chip.link


def parse_topology(text: str) -> Topology:
    """The topology `CHIP:SHAPE`. Raises ConfigError for an unknown chip or shape."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"topology {text!r}: there is no chip {name!r}", did_you_mean(name, CHIPS))
    chip = CHIPS[name]
    if shape not in chip.slices:
        raise ConfigError(f"topology {text!r}: {name} has no shape {shape!r}", f"use one of {', '.join(chip.slices)}")
    return Topology(chip, shape)


def slices_of(chip: Chip) -> Iterator[Topology]:
    """The chip's topologies, the smallest first."""
    return (Topology(chip, shape) for shape in chip.slices)


def meshes(count: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (data, fsdp, expert, tensor) whose product is `count`."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    for data, fsdp, expert in itertools.product(divisors, repeat=3):
        if count % (data * fsdp * expert) == 0:
            yield data, fsdp, expert, count // (data * fsdp * expert)
