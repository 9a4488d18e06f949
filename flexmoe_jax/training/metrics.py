"""Metrics as one JSON object per line of `metrics.jsonl`, written by process 0.

    step                 number of the step, from 0
    loss, grad_norm, ..  metrics of the step (step.py); null if not finite
    share                mean routed weight of each expert
    time                 seconds of a monotonic clock when the step was dispatched
    step_seconds         wall time of a step: mean over the steps since the previous line
    tokens_per_second    positions of a batch / `step_seconds`
    mfu, peak_flops      model FLOP/s / `peak_flops`, the peak of all devices together (parallel/chips.py); absent if
                         the peak is unknown, as for CPUs

A step lasts from the end of the previous step until its metrics can be read. Waiting for data and for other processes
counts. Saving and writing profiles do not count, and neither does the first step of a process, which compiles: a line
without a step that counts has none of the last four keys.
"""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError
from flexmoe_jax.files import write_bytes

log = logging.getLogger(__name__)
MOST_SKIPPED = 0.01  # of a run's steps
OF_TIME = ("time", "step_seconds", "tokens_per_second", "mfu", "peak_flops")  # keys that differ between equal runs


class MetricsFile:
    """Appends to `path`; when a run resumes, drops the lines of step `resume_step` and later.

    Use it in a `with` block. `written` False: this process writes nothing.
    """

    def __init__(self, path: pathlib.Path, resume_step: int = 0, written: bool = True):
        self._file = None
        if not written:
            return
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text(encoding="utf-8").splitlines():
                # Only the last line can be cut short by a crash, and it is of a step after the checkpoint.
                if line.endswith("}") and json.loads(line)["step"] < resume_step:
                    kept.append(line + "\n")
        write_bytes(path, "".join(kept).encode())  # atomic: another crash must not lose these lines
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, values: dict) -> None:
        """Writes one line of JSON values; ArtifactError if the system refuses it."""
        if not self._file:
            return
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:
            remedy = "free some space, then run the same command: it resumes at the last saved step"
            raise ArtifactError(f"{self._file.name} cannot be written: {error.strerror}", remedy) from error

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # every line is flushed: `write` has reported it
                self._file.close()


class Meter:
    """Wall time of steps and the rates that follow from it.

    A step has `tokens` positions and `flops_per_token`; `peak_flops` is the peak of all devices in FLOP/s, or None if
    it is unknown.
    """

    def __init__(self, tokens: int, flops_per_token: float, peak_flops: float | None):
        self._tokens, self._flops, self._peak = tokens, flops_per_token, peak_flops
        self._mark: float | None = None  # end of the previous step
        self._seconds, self._steps = 0.0, 0

    def step_ended(self) -> None:
        """Counts the time since the previous step as the time of this one."""
        now = time.monotonic()
        if self._mark is not None:
            self._seconds, self._steps = self._seconds + now - self._mark, self._steps + 1
        self._mark = now

    def resume(self) -> None:
        """Excludes the time since the last step from the next one."""
        self._mark = self._mark and time.monotonic()

    def read(self) -> dict[str, float]:
        """The last four keys of a line, over the steps since the last call."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        if not steps:
            return {}
        rate = self._tokens * steps / seconds
        used = {} if self._peak is None else {"mfu": self._flops * rate / self._peak, "peak_flops": self._peak}
        return {"step_seconds": seconds / steps, "tokens_per_second": rate, **used}


class Recorder:
    """Reads a step's metrics after the next step is dispatched, so that no device waits, and writes their lines.

    Raises FlexMoEError after `max_bad_steps` steps in a row with a non-finite loss or gradient. `names` are the experts
    in canonical order.
    """

    def __init__(self, run: RunConfig, names: Sequence[str], file: MetricsFile, advance: Callable, meter: Meter):
        self._run, self._names, self._file, self._advance, self._meter = run, names, file, advance, meter
        self._pending: tuple | None = None

    def add(self, n: int, metrics: dict) -> None:
        """Takes the metrics of step `n`, just dispatched, and reads those of the previous step."""
        self.settle()
        self._pending = (n, metrics, time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps; the time spent in the block counts for none of them."""
        self.settle()
        yield
        self._meter.resume()

    def settle(self) -> None:
        """Waits for the last step and reads its metrics."""
        if self._pending is None:
            return
        (n, metrics, dispatched), self._pending, run = self._pending, None, self._run
        values = {key: np.asarray(value).tolist() for key, value in metrics.items()}
        self._meter.step_ended()
        share = dict(zip(self._names, values.pop("share"), strict=True))
        skipped = f", {values['skipped']} skipped" if values["skipped"] else ""
        self._advance(1, f"loss {values['loss']:.3f}{skipped}")
        if n % run.log_every == 0 or n + 1 == run.steps or values["bad_steps"]:
            finite = {key: value if np.isfinite(value) else None for key, value in values.items()}
            line = {"step": n, **finite, "share": share, "time": round(dispatched, 3), **self._meter.read()}
            self._file.write(line)
        if values["bad_steps"]:
            rows = run.batch_size - run.public_sequences
            cause = "gradient" if np.isfinite(values["loss"]) else "loss"
            data = "data" if "own" in run.sources else "mixture"
            where = f"windows {n * rows} to {(n + 1) * rows - 1} of the {data} in the order of seed {run.seed}"
            log.info(f"step {n} is skipped: its {cause} is not finite ({where})")
        if values["bad_steps"] >= run.max_bad_steps:
            raise FlexMoEError(
                f"the loss or its gradient was not finite for {values['bad_steps']} steps in a row, up to step {n}",
                "look at these documents, or lower config.optimizer.lr with --allow=config.optimizer.lr: the run "
                "resumes at its last checkpoint",
            )


def check_skipped(run: RunConfig, skipped: int) -> None:
    """DataError if the run skipped more than `MOST_SKIPPED` of its steps: its product would not be what it states."""
    if skipped > MOST_SKIPPED * run.steps:
        raise DataError(
            f"{skipped} of {run.steps} steps were skipped, since their loss or gradient was not finite: more than "
            f"{MOST_SKIPPED:.0%}, and nothing is published from {run.out}; its checkpoints remain",
            "look at the documents of these steps, or lower config.optimizer.lr, and train in another config.out; or "
            "train on with more config.steps and --allow=config.steps",
        )
