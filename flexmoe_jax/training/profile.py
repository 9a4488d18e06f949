"""XLA profiles of some steps: what the host and the devices do."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator

import jax

from flexmoe_jax.errors import ConfigError


def parse_steps(text: str | None, steps: int) -> range:
    """ "10:13" -> the steps 10, 11, 12 and 13 of a run of `steps`; None: no steps. ConfigError for anything else."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--profile is {text!r}", "give the first and the last step: --profile=10:13")
    if int(match[2]) >= steps:
        raise ConfigError(
            f"--profile is {text!r}, the run has the steps 0 to {steps - 1}",
            f"end before step {steps}, or train longer",
        )
    return range(int(match[1]), int(match[2]) + 1)


class Profile:
    """Writes the profile of `steps` into `folder`, for TensorBoard, xprof or Perfetto; use it in a `with` block.

    The profile marks every step as `train` with its number; a step includes the wait for data. A run that stops early,
    or resumes inside `steps`, leaves a profile of the steps it ran.
    """

    def __init__(self, steps: range, folder: pathlib.Path):
        self._steps, self._folder, self._running = steps, folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, n: int, paused: Callable) -> Iterator[None]:
        """A context around step `n`; `paused()` is a context that first waits for all steps."""
        if n in self._steps and not self._running:
            with paused():
                jax.profiler.start_trace(self._folder)
                self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=n):
            yield
        if self._running and n + 1 not in self._steps:
            with paused():
                self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
