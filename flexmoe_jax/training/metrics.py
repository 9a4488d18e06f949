"""Metrics as one JSON object per line of `metrics.jsonl`, written by process 0.

    step                 number of the step, from 0: the last of those that the line is about
    steps                how many steps the means of the line are over
    loss, grad_norm, ..  metrics of the steps (step.py): means over the steps since the previous line, but `lr` and the
                         counters, which are the last step's
    share                mean routed weight of each expert, and by layer in `share_by_layer`
    distance             of the owner's expert from the public one (validation.py)
    seen                 {source: tokens and epochs since the run's start}
    time                 seconds of a monotonic clock when the step was dispatched
    step_seconds         wall time of a step: mean over the steps since the previous line
    tokens_per_second    positions of a batch / `step_seconds`
    mfu, peak_flops      model FLOP/s / `peak_flops`, the peak of all devices together (parallel/chips.py); absent if
                         the peak is unknown, as for CPUs

A step that is skipped has a line of its own, with the values that are not finite null, and is in no mean. A validation
has one, too: `step` and `validation`, {source: bits per byte}.

A step lasts from the end of the previous step until its metrics can be read. Waiting for data and for other processes
counts. Saving, validating and writing profiles do not count, and neither does the first step of a process, which
compiles: a line without a step that counts has none of the last four keys.
"""

import contextlib
import json
import logging
import operator
import pathlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ArtifactError, DivergedError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.progress import Advance

log = logging.getLogger(__name__)
MOST_SKIPPED = 0.01  # of a run's steps
LAST = ("lr", "bad_steps", "skipped", "distance", "seen")  # of a line's last step, not means
_COLUMNS = {"loss": "loss", "own_loss": "own", "public_loss": "public", "grad_norm": "grad norm", "lr": "lr"}
_COLUMNS |= {"router_accuracy": "router right", "distance": "distance", "tokens_per_second": "tokens/s"}
CHANCE = 0.6  # accuracy at or below which a layer's router is said to tell nothing
# As OLMo-core's SkipStepOptimizer tells spikes, with fewer steps at the start.
SPIKE_STEPS, SPIKE_LEAST, SPIKE_DEVIATIONS = 128, 32, 6.0
OF_TIME = ("time", "step_seconds", "tokens_per_second", "mfu", "peak_flops")  # keys that differ between equal runs


class Sink(Protocol):
    """Takes lines of metrics."""

    def write(self, line: dict) -> None:
        """Takes one line of JSON values; its `step` is the number of a step."""


class MetricsFile:
    """Appends to `path`, without the lines of step `resume_step` and later; use it in a `with` block."""

    def __init__(self, path: pathlib.Path, resume_step: int = 0):
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                # Only the last line can be cut short by a crash, and it is of a step after the checkpoint.
                if line.endswith("\n") and json.loads(line)["step"] < resume_step:
                    kept.append(line)
        write_bytes(path, "".join(kept).encode())  # atomic: another crash must not lose these lines
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, line: dict) -> None:
        """Writes one line of JSON values; ArtifactError if the system refuses it."""
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            remedy = "free some space, then run the same command: it resumes at the last saved step"
            raise ArtifactError(f"{self._file.name} cannot be written: {error.strerror}", remedy) from error

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
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


class Window:
    """Sums of the metrics of the steps since the last line, and the losses that a new one is held against.

    Its `state` is part of a checkpoint, so that the lines of a resumed run are those of an uninterrupted one.
    """

    def __init__(self, state: dict | None = None):
        self.steps, self.losses, self.spikes = 0, list[float](), 0
        self.sums: Any = None
        vars(self).update(state or {})

    def add(self, values: dict) -> float | None:
        """Takes the metrics of a step; by how many standard deviations its loss is above those before, if a spike."""
        self.steps += 1
        self.sums = values if self.sums is None else jax.tree.map(operator.add, self.sums, values)
        mean, deviation = np.mean(self.losses or [0]), np.std(self.losses or [0])
        known, loss = len(self.losses) >= SPIKE_LEAST, values["loss"]
        self.losses = [*self.losses, loss][-SPIKE_STEPS:]
        above = (loss - mean) / max(deviation, 1e-6) if known else 0.0
        self.spikes += int(above > SPIKE_DEVIATIONS)
        return float(above) if above > SPIKE_DEVIATIONS else None

    def means(self) -> dict:
        """The means of the steps so far."""
        return jax.tree.map(lambda total: total / self.steps, self.sums)

    def close(self) -> None:
        """Starts the next line."""
        self.steps, self.sums = 0, None

    @property
    def state(self) -> dict:
        """JSON values from which the window can be made again."""
        return dict(vars(self))


def log_chance(accuracy_L: Sequence[float]) -> None:
    """Logs the layers whose router is at or near chance: their share of tokens told right is at most `CHANCE`."""
    if weak := [str(layer) for layer, accuracy in enumerate(accuracy_L) if accuracy <= CHANCE]:
        log.info(
            f"the router does not tell the owner's text from public text in layer {', '.join(weak)} (at most "
            f"{CHANCE:.0%} of the tokens right, chance is 50%): merged, the experts are mixed evenly there"
        )


class Recorder:
    """Reads a step's metrics after the next step is dispatched, so that no device waits, and writes their lines.

    `names` are the experts in canonical order; `sinks` take the lines. Raises DivergedError after `max_bad_steps` steps
    in a row with a non-finite loss or gradient.
    """

    def __init__(self, run: RunConfig, names: Sequence[str], sinks: Collection[Sink], advance: Advance, meter: Meter):
        self._run, self._names, self._sinks, self._advance, self._meter = run, names, sinks, advance, meter
        self._pending: tuple | None = None
        self._shown: dict | None = None  # the means that the progress display shows
        self._end: dict = {}  # what a line that ends with the last step has besides means
        self.window = Window()

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

    def logs(self, n: int) -> bool:
        """Whether a line ends with step `n`."""
        return (n + 1) % self._run.log_every == 0 or n + 1 == self._run.steps

    def settle(self) -> None:
        """Waits for the last step and reads its metrics."""
        if self._pending is None:
            return
        (n, metrics, dispatched), self._pending = self._pending, None
        values = jax.tree.map(lambda value: np.asarray(value).tolist(), metrics)
        self._meter.step_ended()
        last = {key: values.pop(key) for key in LAST if key in values}
        if last["bad_steps"]:
            self._skipped(n, values, last)
        elif (above := self.window.add(values)) is not None:
            log.info(
                f"step {n}: the loss {values['loss']:.3f} is {above:.1f} standard deviations above the mean of (at "
                f"most) {SPIKE_STEPS} steps before: a spike"
            )
        self._end = {"step": n, **last, "time": round(dispatched, 3)}
        if self.window.steps and self._shown is None:
            self._advance(0, note_of(self.window.means(), last["skipped"]))
        if self.logs(n):
            self.finish()
        self._advance(1)

    def finish(self) -> None:
        """Ends the line with the last step, where there are steps since the line before."""
        self.settle()
        if self.window.steps:
            self._shown = self.window.means()
            self._advance(0, note_of(self._shown, self._end["skipped"]))
            counted = {"steps": self.window.steps, "spikes": self.window.spikes}
            self.write(self._named(self._shown) | self._end | counted | self._meter.read())
            if self._end["step"] + 1 == self._run.steps:
                log_chance(self._shown.get("router_accuracy", []))
            self.window.close()

    def write(self, line: dict) -> None:
        """Writes a line, and shows it as a row."""
        for sink in self._sinks:
            sink.write(line)
        self._advance(0, None, row_of(line))

    def _named(self, values: dict) -> dict:
        """Metrics with the experts' shares by name."""
        by_layer = dict(zip(self._names, np.transpose(values["share"]).tolist(), strict=True))
        means = {name: float(np.mean(layers)) for name, layers in by_layer.items()}
        return {**values, "share": means, "share_by_layer": by_layer}

    def _skipped(self, n: int, values: dict, last: dict) -> None:
        """Writes and logs that step `n` is skipped; DivergedError where too many were in a row."""
        run = self._run
        finite = jax.tree.map(lambda value: value if np.isfinite(value) else None, self._named(values))
        for sink in self._sinks:
            sink.write({"step": n, **finite, **last})
        self._advance(0, f"{last['skipped']} skipped")
        rows = run.batch_size - run.public_sequences
        cause = "gradient" if np.isfinite(values["loss"]) else "loss"
        data = "data" if "own" in run.sources else "mixture"
        where = f"windows {n * rows} to {(n + 1) * rows - 1} of the {data} in the order of seed {run.seed}"
        log.info(f"step {n} is skipped: its {cause} is not finite ({where})")
        if last["bad_steps"] >= run.max_bad_steps:
            raise DivergedError(
                f"the loss or its gradient was not finite for {last['bad_steps']} steps in a row, up to step {n}",
                "look at these documents, or lower config.optimizer.lr with --allow=config.optimizer.lr: the run "
                "resumes at its last checkpoint",
            )


def note_of(means: dict, skipped: int) -> str:
    """Means of a window in a few words, for the progress display."""
    apart = [f"{name} {means[f'{name}_loss']:.3f}" for name in ("own", "public") if f"{name}_loss" in means]
    words = [f"loss {means['loss']:.3f}" + (f" ({', '.join(apart)})" if apart else "")]
    return ", ".join([*words, f"{skipped} skipped"] if skipped else words)


def row_of(line: dict) -> dict[str, str]:
    """A line as a row of the live table: {column: text}."""
    row = {"step": str(line["step"] + 1)}
    for key, column in _COLUMNS.items():
        if key in line:
            row[column] = f"{float(np.mean(line[key])):.4g}"
    row |= {f"{source} epochs": f"{seen['epochs']:.2f}" for source, seen in line.get("seen", {}).items()}
    row |= {
        f"{source} bits/byte": f"{bits:.4f}" for source, bits in line.get("validation", {}).items() if bits is not None
    }
    return row


def check_skipped(run: RunConfig, skipped: int, steps: int) -> None:
    """DivergedError if more than `MOST_SKIPPED` of a run's `steps` were skipped: its product is not what it states."""
    if skipped > MOST_SKIPPED * steps:
        raise DivergedError(
            f"{skipped} of {steps} steps were skipped, since their loss or gradient was not finite: more than "
            f"{MOST_SKIPPED:.0%}, and nothing is published from {run.out}; its checkpoints remain",
            "look at the documents of these steps, or lower config.optimizer.lr, and train in another config.out; or "
            "train on with more config.steps and --allow=config.steps (and no config.patience)",
        )
