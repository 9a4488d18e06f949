"""The processes of a job meet over plain TCP, to show that they reach one another before JAX waits for them in silence.

Process 0 listens at the coordinator's address for a moment; the others say who they are and are told who has come. One
JSON line each way; nothing is run, and nothing but a few short fields is kept.
"""

import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import Mapping

from flexmoe_jax.errors import MachineError

LIMIT = 1 << 16  # bytes of a line
WAIT_S = 30  # Slurm and ssh start processes within seconds of one another


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place in its job."""

    count: int
    number: int
    coordinator: str  # host:port


@dataclasses.dataclass(frozen=True)
class Roll:
    """Who came: process number -> its host and versions. `trouble` says why nobody could be asked."""

    place: Place
    seen: tuple[tuple[int, Mapping[str, str]], ...] = ()  # a number may come twice
    trouble: str = ""


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment gives this process; `None` for one alone, or where only JAX can find it out."""
    count = environment.get("FLEXMOE_PROCESSES")
    if count is None:
        return None
    if count != "auto":
        number, coordinator = environment.get("FLEXMOE_PROCESS_ID", ""), environment.get("FLEXMOE_COORDINATOR", "")
        port = coordinator.rpartition(":")[2]
        good = count.isdecimal() and number.isdecimal() and coordinator.count(":") == 1 and port.isdecimal()
        if not good or int(number) >= int(count):
            raise MachineError(
                f"FLEXMOE_PROCESSES is {count!r}, FLEXMOE_PROCESS_ID {number!r}, FLEXMOE_COORDINATOR {coordinator!r}",
                "set FLEXMOE_PROCESSES to `auto`, or to N with FLEXMOE_PROCESS_ID from 0 to N-1 and "
                "FLEXMOE_COORDINATOR to host:port",
            )
        return Place(int(count), int(number), coordinator)
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"} <= environment.keys():
        # JAX's own choice: the first node, and a port that follows from the job's number.
        first = re.sub(r"\[(\w+).*", r"\1", environment["SLURM_STEP_NODELIST"].partition(",")[0])
        meet = f"{first}:{int(environment['SLURM_JOB_ID']) % 2**12 + 65535 - 2**12 + 1}"
        return Place(int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]), meet)
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if "TPU_WORKER_ID" in environment and hosts and "MEGASCALE_NUM_SLICES" not in environment:
        return Place(len(hosts), int(environment["TPU_WORKER_ID"]), f"{hosts[0]}:8482")
    return None


def call(place: Place, about: Mapping[str, str], wait_s: float = WAIT_S) -> Roll:
    """Meets the others for at most `wait_s` seconds; `about` is what they are told of this process."""
    try:
        seen = _listen(place, about, wait_s) if place.number == 0 else _report(place, about, wait_s)
    except OSError as error:
        return Roll(place, trouble=str(error))
    return Roll(place, tuple(sorted(seen, key=lambda one: one[0])))


def _listen(place: Place, about: Mapping[str, str], wait_s: float) -> list:
    """Process 0: waits for all, then tells each who came."""
    end, seen, waiting = time.monotonic() + wait_s, [(0, dict(about))], []
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = stack.enter_context(
            socket.create_server(
                ("", int(place.coordinator.rpartition(":")[2])),
                family=family,
                dualstack_ipv6=family == socket.AF_INET6,
                backlog=max(128, place.count),
            )
        )
        while len(seen) < place.count and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                one, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(one)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                one.settimeout(min(2.0, max(left, 0.1)))
                said = json.loads(_line(one))
                seen.append((int(said["number"]), {_plain(k): _plain(v) for k, v in said["about"].items()}))
                waiting.append(one)
        answer = json.dumps(seen).encode() + b"\n"
        for one in waiting:
            with contextlib.suppress(OSError):
                one.settimeout(2.0)
                one.sendall(answer)
    return seen


def _report(place: Place, about: Mapping[str, str], wait_s: float) -> list:
    """Another process: tries until process 0 listens, says who it is, and hears who came."""
    host, _, port = place.coordinator.rpartition(":")
    end = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(0.1, end - time.monotonic())) as server:
                server.settimeout(wait_s + 5)  # process 0 answers when all have come, or its own time is over
                server.sendall(json.dumps({"number": place.number, "about": dict(about)}).encode() + b"\n")
                return [(int(number), dict(one)) for number, one in json.loads(_line(server))]
        except (OSError, ValueError) as error:
            if time.monotonic() + 0.2 >= end:
                raise OSError(f"{place.coordinator}: {error}") from error
            time.sleep(0.2)


def _plain(value: object) -> str:
    """A short text that does nothing to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:200])


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > LIMIT:
            raise ValueError("no line")
        line += part
    return line
