"""The processes of a job: all of them compute the same program, process 0 writes files and logs.

A process belongs to a job when FLEXMOE_PROCESSES is set: to `auto` where JAX finds the other processes by itself
(Slurm, TPU pods), or to the number of processes, with FLEXMOE_PROCESS_ID (0 to N-1) and FLEXMOE_COORDINATOR (host:port
of process 0). Functions import JAX when they are called: `flexmoe doctor` must also work where JAX is broken.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmoe_jax.errors import MachineError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

HEARTBEAT_S = 20  # a process that is silent for this long is considered dead, and ends the job
COUNT, NUMBER, COORDINATOR = "FLEXMOE_PROCESSES", "FLEXMOE_PROCESS_ID", "FLEXMOE_COORDINATOR"
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place in its job: process `number` of `count`. `coordinator` is host:port of process 0."""

    count: int
    number: int
    coordinator: str


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment gives this process; None without a job, and where only JAX can find the place.

    For FLEXMOE_PROCESSES=auto it is the place that JAX finds in a Slurm job or on a TPU pod slice. Raises MachineError
    for variables that do not name a place.
    """
    if COUNT not in environment:
        return None
    return _found_place(environment) if environment[COUNT] == AUTO else _given_place(environment)


def join() -> None:
    """Joins the job that the environment names; without one, or when called again, nothing happens.

    Raises MachineError for variables that do not name a place.
    """
    import jax

    if COUNT not in os.environ or jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_S}
    if os.environ[COUNT] != AUTO:
        place = _given_place(os.environ)
        options |= {
            "coordinator_address": place.coordinator,
            "num_processes": place.count,
            "process_id": place.number,
            "cluster_detection_method": "deactivate",  # inside a Slurm job JAX would give each process one GPU
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPU devices only; others have their own
    jax.distributed.initialize(**options)


def is_lead() -> bool:
    """Whether this is process 0, which writes files and logs."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it; `name` tells barriers apart."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_lead(value: int) -> int:
    """The `value` of process 0, on every process."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def gather(value: bytes) -> list[bytes]:
    """The `value` of every process by its number, on every process; all values have the same length."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(value, np.uint8)))
    return [row.astype(np.uint8).tobytes() for row in rows]


def to_host(leaf: "jax.Array | np.ndarray") -> np.ndarray:
    """The whole array on every process, however it is sharded; every process must call it."""
    import jax

    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


class Agreement:
    """Decisions that must be equal on all processes: each one asks for some, and all get those that any asked for."""

    def __init__(self, mesh: "Mesh") -> None:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self.shared, self._size = jax.process_count() > 1, mesh.size
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda asked: asked.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, *wishes: bool) -> "jax.Array | np.ndarray":
        """Starts an all-reduce of the wishes without waiting for it; `read` takes what this returns."""
        import jax

        if not self.shared:
            return np.array(wishes)
        asked = np.array([wishes], np.int32)
        return self._any(jax.make_array_from_callback((self._size, len(wishes)), self._split, lambda _: asked))

    def read(self, answer: "jax.Array | np.ndarray") -> list[bool]:
        """For each wish, whether any process has it; waits for the all-reduce."""
        return [bool(value) for value in np.asarray(answer)]


def _given_place(environment: Mapping[str, str]) -> Place:
    """The place that the three variables state."""
    count, number, coordinator = (environment.get(name, "") for name in (COUNT, NUMBER, COORDINATOR))
    host, _, port = coordinator.rpartition(":")
    well_formed = count.isdecimal() and number.isdecimal() and port.isdecimal() and re.fullmatch(r"[^:]+|\[.+\]", host)
    if not well_formed or int(number) >= int(count):
        raise MachineError(
            f"{COUNT} is {count!r}, {NUMBER} {number!r}, {COORDINATOR} {coordinator!r}",
            f"set {COUNT} to `{AUTO}`, or to N with {NUMBER} from 0 to N-1 and {COORDINATOR} to host:port",
        )
    return Place(int(count), int(number), coordinator)


def _found_place(environment: Mapping[str, str]) -> Place | None:
    """The place that JAX takes from a Slurm job or a TPU pod slice (jax/_src/clusters); None elsewhere."""
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"} <= environment.keys():
        host = re.sub(r"\[(\w+).*", r"\1", environment["SLURM_STEP_NODELIST"].partition(",")[0])
        port = int(environment["SLURM_JOB_ID"]) % 2**12 + 65535 - 2**12 + 1
        return Place(int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]), f"{host}:{port}")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if "TPU_WORKER_ID" in environment and hosts and "MEGASCALE_NUM_SLICES" not in environment:
        return Place(len(hosts), int(environment["TPU_WORKER_ID"]), f"{hosts[0]}:8482")
    return None
