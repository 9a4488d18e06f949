"""The compiler's own figures: the program is compiled ahead of time for TPUs that are not here."""

import dataclasses
import os
import re
from typing import Any

import jax

from flexmoe_jax.errors import MachineError
from flexmoe_jax.parallel.chips import Topology
from flexmoe_jax.parallel.mesh import make_mesh
from flexmoe_jax.plan.hlo import collectives
from flexmoe_jax.plan.work import Work, lower


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one device: bytes, operations, collectives as hlo.py counts them.

    `refused` is the compiler's reason where the program does not fit; the other fields are then 0.
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    flops: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    refused: str = ""


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices, for the compiler only. Raises MachineError without libtpu, and for GPUs."""
    remedy = "pip install 'flexmoe_jax[tpu]', or leave out --compile for an estimate"
    if not topology.chip.is_tpu:
        raise MachineError(f"{topology.name}: compiling for a GPU needs the GPU", "leave out --compile for an estimate")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise MachineError("compiling for TPUs needs libtpu, which is not installed", remedy) from error
    from jax.experimental import topologies

    # No TPU is used: other processes may use libtpu meanwhile, and there is no metadata server.
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        os.environ.setdefault(name, "1")
    sides = [*topology.shape.split("x"), "1", "1"][:3]
    host = {"chips_per_host_bounds": tuple(min(int(side), 2) for side in sides)}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host).devices)


def compile_for(work: Work, topology: Topology, mesh: str) -> Compiled:
    """Compiles `work` for a mesh of the topology's chips. Raises MachineError as `devices_of` does."""
    return read(lower(work, make_mesh(mesh, devices_of(topology))))


def read(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles the program and reads its figures; running out of memory is a result, not an error."""
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(refused=re.sub(r"\s+", " ", str(error).partition("\n\n")[0]).strip())
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=cost.get("flops", 0.0),
        collectives=collectives(compiled.as_text()),
    )
