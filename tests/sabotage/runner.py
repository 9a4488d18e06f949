"""Applies faults to copies of the package and runs the tests that must notice them."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.sabotage.fault import Fault

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = "flexmoe_jax"
COPIED = (PACKAGE, "tests", "experiments", "pyproject.toml")
WORKERS = 2
SECONDS = 300  # for one test; a fault that makes it hang is not caught
CAUGHT, SURVIVED = "caught", "SURVIVED"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a fault: `CAUGHT`, `SURVIVED`, or why that cannot be said."""

    fault: Fault
    outcome: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Tests of one run of pytest: `passed`, and {failed: whether by a broken promise}.

    `said` is pytest's last line. `status` is its exit code: 0 if all passed, 1 if some failed.
    """

    passed: frozenset[str]
    failed: dict[str, bool]
    said: str
    status: int

    def of(self, test: str) -> tuple[list[str], dict[str, bool]]:
        """(passed, failed) of the node `test`, with all its parameters."""

        def belongs(node: str) -> bool:
            return node == test or node.startswith(f"{test}[")

        return [node for node in self.passed if belongs(node)], {n: how for n, how in self.failed.items() if belongs(n)}


def run(faults: Sequence[Fault]) -> Iterator[Verdict]:
    """The verdict of each fault, in order. The named tests also run together on a copy without a fault."""
    with ThreadPoolExecutor(WORKERS) as pool:
        clean = pool.submit(tests_on_copy, sorted({fault.test for fault in faults}), None)
        for fault, verdict in zip(faults, pool.map(try_fault, faults), strict=True):
            passed, failed = clean.result().of(fault.test)
            if failed or not passed:
                why = "fails" if failed else f"does not run ({clean.result().said})"
                verdict = dataclasses.replace(verdict, outcome=f"the test {why} without the fault")
            yield verdict


def try_fault(fault: Fault) -> Verdict:
    """Runs the fault's test on a copy that has the fault."""
    started = time.monotonic()
    try:
        outcomes = tests_on_copy([fault.test], fault)
        passed, failed = outcomes.of(fault.test)
        if any(failed.values()):
            outcome = CAUGHT
        elif failed or not passed or outcomes.status:
            outcome = f"the test breaks down: {outcomes.said}"
        else:
            outcome = SURVIVED
    except (ValueError, SyntaxError) as error:
        outcome = f"does not apply: {error}"
    except subprocess.TimeoutExpired:
        outcome = f"the test takes over {SECONDS} seconds"
    return Verdict(fault, outcome, time.monotonic() - started)


def tests_on_copy(tests: Sequence[str], fault: Fault | None) -> Outcomes:
    """Runs `tests` on a copy of the package, which has the `fault`; errors as of `Fault.applied`."""
    with tempfile.TemporaryDirectory(prefix="sabotage-") as name:
        copy = pathlib.Path(name).resolve()
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, copy / part)
        if fault is not None:
            place = copy / PACKAGE / fault.file
            place.write_text(fault.applied(place.read_text()))
        outcomes = copy / "outcomes.json"
        arguments = ["-q", "--no-header", "-p", "tests.sabotage.outcomes", f"--basetemp={copy / 'made'}", *tests]
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", *arguments],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "SABOTAGE_OUTCOMES": str(outcomes)},
            capture_output=True,
            text=True,
            timeout=SECONDS if fault else None,
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if not outcomes.exists():
            return Outcomes(frozenset(), {}, lines[-1], done.returncode)
        found = json.loads(outcomes.read_text())
        assert pathlib.Path(found["package"]).is_relative_to(copy), f"{found['package']} was tested, not {copy}"
        return Outcomes(frozenset(found["passed"]), found["failed"], lines[-1], done.returncode)
