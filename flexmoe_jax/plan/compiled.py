"""The compiler's own answer: the program compiled ahead of time for chips that are not here."""

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
    """Bytes and operations of one device. `refused` is the compiler's reason, and then there is nothing else."""

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    flops: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    refused: str = ""


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices as the compiler knows them. MachineError without libtpu, or for GPUs."""
    remedy = "install it with `pip install 'flexmoe_jax[tpu]'`; without --compile the plan is by arithmetic"
    if not topology.chip.is_tpu:
        raise MachineError(f"{topology.name} cannot be compiled for without its GPU", "leave out --compile")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise MachineError("libtpu is not installed, which compiles for TPUs", remedy) from error
    from jax.experimental import topologies

    # No TPU is touched: others may use libtpu at the same time, and there is no metadata server to ask.
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        os.environ.setdefault(name, "1")
    sides = [*topology.shape.split("x"), "1", "1"][:3]
    host = {"chips_per_host_bounds": tuple(min(int(side), 2) for side in sides)}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host).devices)


def compile_for(work: Work, topology: Topology, mesh: str) -> Compiled:
    """Compiles `work` for the topology and reads what the compiler says of it."""
    return read(lower(work, make_mesh(mesh, devices_of(topology))))


def read(lowered) -> Compiled:
    """Compiles, and reads sizes, operations and collectives. Out of memory is an answer, not an error."""
    try:
        compiled = lowered.compile()
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
