"""Processes that join into one job. Everything is computed by all; files are written, and people spoken to, by one.

A process joins when FLEXMOE_PROCESSES is set: to `auto` where JAX finds out the rest by itself (Slurm, TPU pods), or to
the number of processes, with FLEXMOE_PROCESS_ID (0 to N-1) and FLEXMOE_COORDINATOR (host:port of process 0).
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexmoe_jax.errors import ConfigError

HEARTBEAT_S = 20  # a process that is silent for so long is given up, and the job with it
COUNT, NUMBER, COORDINATOR = "FLEXMOE_PROCESSES", "FLEXMOE_PROCESS_ID", "FLEXMOE_COORDINATOR"


def join() -> None:
    """Joins the job that the environment names, once; without one, or when it is joined, nothing happens."""
    count = os.environ.get(COUNT)
    if count is None or jax.distributed.is_initialized():
        return
    options: dict = {"heartbeat_timeout_seconds": HEARTBEAT_S}
    if count != "auto":
        number, coordinator = os.environ.get(NUMBER, ""), os.environ.get(COORDINATOR, "")
        if not count.isdecimal() or not number.isdecimal() or int(number) >= int(count) or ":" not in coordinator:
            raise ConfigError(
                f"{COUNT} is {count!r}, {NUMBER} {number!r}, {COORDINATOR} {coordinator!r}",
                f"set {COUNT} to `auto`, or to N with {NUMBER} from 0 to N-1 and {COORDINATOR} to host:port",
            )
        options |= {"coordinator_address": coordinator, "num_processes": int(count), "process_id": int(number)}
        options["cluster_detection_method"] = "deactivate"  # inside a Slurm job JAX would take one GPU of each process
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices; others have their own
    jax.distributed.initialize(**options)


def is_lead() -> bool:
    """Whether this process writes files and speaks to people."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_lead(value: int) -> int:
    """The lead's `value`, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def to_host(leaf: Any) -> np.ndarray:
    """A whole array on every process, wherever its parts lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


class Agreement:
    """Decisions that must be the same everywhere: each process asks for some, and all get what any asked for."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh if jax.process_count() > 1 else None
        self.shared = self._mesh is not None
        self._any = jax.jit(lambda asked: asked.max(0), out_shardings=self._sharding(P()))

    def ask(self, *wishes: bool) -> Any:
        """Begins to ask; give what it returns to `read`, when there has been time for the answer."""
        if self._mesh is None:
            return np.array(wishes)
        asked = np.array([wishes], np.int32)
        shape, sharding = (self._mesh.size, len(wishes)), NamedSharding(self._mesh, P(self._mesh.axis_names))
        return self._any(jax.make_array_from_callback(shape, sharding, lambda _: asked))

    def read(self, answer: Any) -> list[bool]:
        return [bool(value) for value in np.asarray(answer)]

    def _sharding(self, spec: P) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, spec)
