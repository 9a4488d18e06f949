"""The processes of a job meet over plain TCP: a test that they reach one another, before JAX waits for them silently.

Process 0 listens at the coordinator's address; every other process connects, sends one JSON line about itself, and
receives one JSON line about all that came. Nothing received is executed, and only a few short texts of it are kept.
"""

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Mapping

from flexmoe_jax.parallel.processes import Place

MAX_LINE_BYTES = 1 << 16
WAIT_S = 30  # Slurm and ssh start the processes of a job within seconds of one another
_Seen = list[tuple[int, dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """What this process learned: `seen` are (process number, its host and versions), where a number may occur twice.

    `trouble` is why this process met nobody.
    """

    place: Place
    seen: tuple[tuple[int, Mapping[str, str]], ...] = ()
    trouble: str = ""


def meet(place: Place, about: Mapping[str, str], wait_s: float = WAIT_S) -> Rendezvous:
    """Meets the other processes within `wait_s` seconds; `about` is what they learn about this one."""
    try:
        seen = _listen(place, about, wait_s) if place.number == 0 else _report(place, about, wait_s)
    except OSError as error:
        return Rendezvous(place, trouble=str(error))
    return Rendezvous(place, tuple(sorted(seen, key=lambda one: one[0])))


def _listen(place: Place, about: Mapping[str, str], wait_s: float) -> _Seen:
    """Process 0: waits for all processes, then sends each the list of those that came."""
    end, waiting = time.monotonic() + wait_s, []
    seen: _Seen = [(0, dict(about))]
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
                connection, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(connection)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                connection.settimeout(min(2.0, max(left, 0.1)))
                received = json.loads(_read_line(connection))
                fields = {_printable(k): _printable(v) for k, v in received["about"].items()}
                seen.append((int(received["number"]), fields))
                waiting.append(connection)
        answer = json.dumps(seen).encode() + b"\n"
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.settimeout(2.0)
                connection.sendall(answer)
    return seen


def _report(place: Place, about: Mapping[str, str], wait_s: float) -> _Seen:
    """Any other process: connects once process 0 listens, sends `about`, and receives the list of those that came."""
    host, _, port = place.coordinator.rpartition(":")
    address = (host.strip("[]"), int(port))
    end = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection(address, timeout=max(0.1, end - time.monotonic())) as server:
                server.settimeout(wait_s + 5)  # process 0 answers when all have come, or when its own time is over
                server.sendall(json.dumps({"number": place.number, "about": dict(about)}).encode() + b"\n")
                return [(int(number), dict(one)) for number, one in json.loads(_read_line(server))]
        except (OSError, ValueError) as error:
            if time.monotonic() + 0.2 >= end:
                raise OSError(f"{place.coordinator}: {error}") from error
            time.sleep(0.2)


def _printable(value: object) -> str:
    """A short text without control characters, safe to print in a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:200])


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > MAX_LINE_BYTES:
            raise ValueError("the connection ended before the line did" if not part else "the line is too long")
        line += part
    return line
