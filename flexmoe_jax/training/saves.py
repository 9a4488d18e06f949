"""When a run saves: every so many steps or minutes, and when a signal asks it to stop."""

import time
from typing import Any

from jax.sharding import Mesh

from flexmoe_jax.config import RunConfig
from flexmoe_jax.parallel.processes import Agreement, is_lead
from flexmoe_jax.training.signals import StopSignals


class Saves:
    """Decides after each step, for all processes together; use it in a `with` block, in which `stop` catches signals.

    Several processes agree on the request of a step one step later, when the answer costs no wait.
    """

    def __init__(self, run: RunConfig, mesh: Mesh):
        self._run, self._agreement, self.stop = run, Agreement(mesh), StopSignals()
        self._saved_at = time.monotonic()
        self._answer: Any = None

    def __enter__(self) -> "Saves":
        self.stop.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.stop.__exit__(*error)

    def due(self, n: int) -> tuple[bool, bool]:
        """(whether to stop, whether to save) after step `n`."""
        overdue = is_lead() and (time.monotonic() - self._saved_at) / 60 >= self._run.save_minutes
        asked = self._agreement.ask(self.stop.received is not None, overdue)
        answer = self._answer if self._agreement.shared else None
        stopping, due = self._agreement.read(asked if answer is None else answer)
        self._answer = asked
        return stopping, due or (self._run.save_every is not None and (n + 1) % self._run.save_every == 0)

    def saved(self) -> None:
        """Counts the minutes from now; requests made before are met."""
        self._saved_at, self._answer = time.monotonic(), None
