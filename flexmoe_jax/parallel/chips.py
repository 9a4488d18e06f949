"""Chips that can be planned for, as their makers describe them, and the sizes they come in."""

import dataclasses
import itertools
import math

import jax

from flexmoe_jax.errors import ConfigError, did_you_mean

PEAK_FLOPS = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # v5e; cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p; cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e; cloud.google.com/tpu/docs/v6e
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM; NVIDIA H100 datasheet, half of what it says with sparsity
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,  # NVIDIA H200 datasheet, as above
}


def peak_flops(devices: int) -> float | None:
    """Of the first `devices` devices together, which are of one kind; None where it is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: operations/s, bytes, bytes/s.

    `link` is what it receives from its neighbours, over all links together; `network` what it receives from another
    group where it belongs to a group of `group` chips (GPUs of one machine).
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    slices: tuple[str, ...]
    group: int = 0
    network: float = 0.0

    @property
    def is_tpu(self) -> bool:
        return not self.group


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024")

# Peaks are of dense bf16 products. Makers count an interconnect's both directions: half of that is received.
CHIPS = {
    chip.name: chip
    for chip in (
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, interconnect 400 GBps in both directions
        Chip("v5e", PEAK_FLOPS["TPU v5e"], 16e9, 819e9, 200e9, _FLAT),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GB, 2765 GBps, interconnect 4800 Gbps (v5e's: 1600 Gbps)
        Chip("v5p", PEAK_FLOPS["TPU v5p"], 95e9, 2765e9, 600e9, _CUBES),
        # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, interconnect 800 GBps in both directions
        Chip("v6e", PEAK_FLOPS["TPU v6e"], 32e9, 1638e9, 400e9, _FLAT),
        # nvidia.com/en-us/data-center/h100 (SXM): 1,979 TFLOPs with sparsity, half without; 80 GB, 3.35 TB/s, NVLink
        # 900 GB/s. Between machines 400 Gb/s for each GPU: docs.nvidia.com/dgx/dgxh100-user-guide.
        Chip("h100", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80e9, 3350e9, 450e9, _GPUS, group=8, network=50e9),
        # nvidia.com/en-us/data-center/h200 (SXM): the same but for 141 GB, 4.8 TB/s
        Chip("h200", PEAK_FLOPS["NVIDIA H200"], 141e9, 4800e9, 450e9, _GPUS, group=8, network=50e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are connected: `v5p:4x4x4`, `h100:8`."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @property
    def count(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    def speed(self, apart: int) -> float:
        """Bytes/s that a chip receives from others of its axis, whose members lie within `apart` neighbours."""
        return self.chip.network if self.chip.group and apart > self.chip.group else self.chip.link


def parse_topology(text: str) -> Topology:
    """`CHIP:SHAPE` -> Topology; ConfigError names the chips or the shapes there are."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"topology {text!r}: there is no chip {name!r}", did_you_mean(name, CHIPS))
    chip = CHIPS[name]
    if shape not in chip.slices:
        raise ConfigError(f"topology {text!r}: {name} has no shape {shape!r}", f"use one of {', '.join(chip.slices)}")
    return Topology(chip, shape)


def slices_of(chip: Chip):
    """Its topologies, the smallest first."""
    return (Topology(chip, shape) for shape in chip.slices)


def meshes(count: int):
    """Every (data, fsdp, expert, tensor) whose product is `count`."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    for data, fsdp, expert in itertools.product(divisors, repeat=3):
        if count % (data * fsdp * expert) == 0:
            yield data, fsdp, expert, count // (data * fsdp * expert)
