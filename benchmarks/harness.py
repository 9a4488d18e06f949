"""What every benchmark shares: interleaved timing, ceilings of this machine, rows of the table, their file."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = pathlib.Path(__file__).parents[1] / "results"
PAUSE_S = 0.02  # lets the worker threads of one library fall asleep before the other begins


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: `ours` and `peer` in `unit`, `ratio` > 1 where ours is better, `ceiling` a fraction."""

    measure: str
    ours: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    ceiling: float | None = None
    goal: str = ""
    met: bool | None = None


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; one round runs all of them, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def ready(call: Callable, *args) -> Callable[[], object]:
    """`call(*args)` that returns when its arrays are there."""
    return lambda: jax.block_until_ready(call(*args))


def gemm(n: int, d: int, f: int, dtype: str = "float32") -> tuple[Callable[[], object], float]:
    """(a plain product [n, d] x [d, f] -> float32, its FLOPs): the ceiling of compute, to be timed beside the rest."""
    x, w = jnp.ones((n, d), dtype), jnp.ones((d, f), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return ready(product, x, w), 2.0 * n * d * f


def copy(megabytes: int = 128) -> tuple[Callable[[], object], float]:
    """(numpy's copy, bytes it reads and writes): the ceiling of memory."""
    source = np.ones(megabytes << 18, np.float32)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source), 2.0 * source.nbytes


def require_close(what: str, ours, theirs, tolerance: float) -> None:
    """Stops where outputs disagree, relative to the largest entry of the peer: no figure is printed then."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not difference <= tolerance:
        raise SystemExit(f"{what}: outputs differ by {difference:.1e} (allowed {tolerance:.0e}); no figure is printed")


def table(rows: list[Row]) -> str:
    """Markdown."""

    def text(value, form):
        return "" if value is None else form.format(value)

    lines = ["| measure | ours | peer | ratio | of ceiling | goal | met |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio, ceiling = text(r.ratio, "{:.2f}"), text(r.ceiling, "{:.0%}")
        met = {None: "", True: "yes", False: "**no**"}[r.met]
        peer = text(r.peer, "{:,.4g} " + r.unit)
        lines.append(f"| {r.measure} | {r.ours:,.4g} {r.unit} | {peer} | {ratio} | {ceiling} | {r.goal} | {met} |")
    return "\n".join(lines)


def record(name: str, command: str, rows: list[Row]) -> pathlib.Path:
    """Writes the rows, with what they were measured on, to `results/bench-NAME.json`."""
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    content = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "processor": _processor(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path = RESULTS / f"bench-{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _processor() -> str:
    lines = (
        pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if platform.system() == "Linux" else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
