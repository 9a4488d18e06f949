"""Metrics as one JSON object per line of `metrics.jsonl`, written by process 0.

    step                 number of the step, from 0
    loss, grad_norm, ..  what the step returns (step.py); null where it is not finite
    share                mean routed weight of each expert
    time                 seconds on this machine's clock when the step was dispatched
    step_seconds         wall time of a step: the mean of the steps since the line before
    tokens_per_second    positions of a batch over `step_seconds`
    mfu, peak_flops      model FLOP/s over `peak_flops`, those of all devices together (parallel/chips.py); absent where
                         the peak of a device is not known, as of CPUs

A step ends when its metrics can be read, and lasts from the end of the one before: waiting for data counts, and so does
waiting for other processes. Saving and the writing of profiles do not, nor does the first step of a process, which is
compiled: lines without a step that counts have none of the last four.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.files import write_bytes

OF_TIME = ("time", "step_seconds", "tokens_per_second", "mfu", "peak_flops")  # what differs between equal runs


class MetricsFile:
    """Appends to `path`; on opening for a resumed run, lines of step `resume_step` and later are dropped.

    Use it in a `with` block. Where it is not `written`, nothing is.
    """

    def __init__(self, path: pathlib.Path, resume_step: int = 0, written: bool = True):
        self._file = None
        if not written:
            return
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text().splitlines():
                # A line cut short by a crash is always the last one, and never of a step before the checkpoint.
                if line.endswith("}") and json.loads(line)["step"] < resume_step:
                    kept.append(line + "\n")
        write_bytes(path, "".join(kept).encode())  # whole or not at all: a second crash must not cost the first lines
        self._file = path.open("a", buffering=1)

    def write(self, values: dict) -> None:
        if self._file:
            self._file.write(json.dumps(values) + "\n")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


class Meter:
    """Wall time of steps, and the rates that follow; `peak_flops` of all devices, None where it is not known."""

    def __init__(self, tokens: int, flops_per_token: float, peak_flops: float | None):
        self._tokens, self._flops, self._peak = tokens, flops_per_token, peak_flops
        self._mark: float | None = None  # when the step before ended
        self._seconds, self._steps = 0.0, 0

    def step_ended(self) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._seconds, self._steps = self._seconds + now - self._mark, self._steps + 1
        self._mark = now

    def go_on(self) -> None:
        """What was done since the last step ended is no part of the next."""
        self._mark = self._mark and time.monotonic()

    def read(self) -> dict[str, float]:
        """The last four keys of a line, of the steps since this was last read."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        if not steps:
            return {}
        rate = self._tokens * steps / seconds
        used = {} if self._peak is None else {"mfu": self._flops * rate / self._peak, "peak_flops": self._peak}
        return {"step_seconds": seconds / steps, "tokens_per_second": rate, **used}


class Recorder:
    """Reads a step's metrics when the next step has been dispatched, so that no device waits; writes their lines.

    Stops a run that has gone bad: reading raises FlexMoEError. `names` are the experts in canonical order.
    """

    def __init__(self, run: RunConfig, names: Sequence[str], file: MetricsFile, advance: Callable, meter: Meter):
        self._run, self._names, self._file, self._advance, self._meter = run, names, file, advance, meter
        self._pending: tuple | None = None

    def add(self, n: int, metrics: dict) -> None:
        """Step `n` was dispatched; the one before is read."""
        self.settle()
        self._pending = (n, metrics, time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Begins when every step has ended; what is done inside counts to none."""
        self.settle()
        yield
        self._meter.go_on()

    def settle(self) -> None:
        """Waits for the last step, and reads it."""
        if self._pending is None:
            return
        (n, metrics, dispatched), self._pending, run = self._pending, None, self._run
        values = {key: np.asarray(value).tolist() for key, value in metrics.items()}
        self._meter.step_ended()
        share = dict(zip(self._names, values.pop("share"), strict=True))
        self._advance(1, f"loss {values['loss']:.3f}")
        if n % run.log_every == 0 or n + 1 == run.steps or values["bad_steps"]:
            finite = {key: value if np.isfinite(value) else None for key, value in values.items()}
            line = {"step": n, **finite, "share": share, "time": round(dispatched, 3), **self._meter.read()}
            self._file.write(line)
        if values["bad_steps"] >= run.max_bad_steps:
            raise FlexMoEError(
                f"the loss or its gradient was not finite for {values['bad_steps']} steps in a row, the last one step "
                f"{n} (windows {n * run.batch_size} to {(n + 1) * run.batch_size - 1} of the order of seed {run.seed})",
                "lower config.optimizer.lr or look at these documents; parameters are those before the first bad step",
            )
