"""Real processes on this machine train what one process trains (`make test-distributed`)."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.parallel import processes
from flexmoe_jax.train.loop import Stopped, train
from flexmoe_jax.tree import flatten
from tests.train.tiny import public_run

STEPS = {"steps": 6, "batch_size": 8}


def one_process(root: str, mesh: str, steps: int) -> None:
    """What each process runs: a training that ends with the exit code of the command line."""
    processes.join()
    try:
        train(dataclasses.replace(public_run(pathlib.Path(root), **STEPS | {"steps": steps}), mesh=mesh))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


def start(root: pathlib.Path, count: int, steps: int = STEPS["steps"]) -> list[subprocess.Popen]:
    """`count` processes of one job on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    call = f"one_process({str(root)!r}, 'fsdp={count}', {steps})"
    running = []
    for number in range(count):
        job = {processes.COUNT: str(count), processes.NUMBER: str(number), processes.COORDINATOR: address}
        command = [sys.executable, "-c", f"from tests.parallel.test_processes import one_process; {call}"]
        running.append(subprocess.Popen(command, env={**os.environ, **job}))
    return running


def end(running: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    try:
        return [process.wait(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()


def wait_for_step(root: pathlib.Path, step: int) -> None:
    path, deadline = root / "public" / "run" / "metrics.jsonl", time.monotonic() + 200
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, "the job does not get there"
        time.sleep(0.02)


def losses(root: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "public" / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_trains(tmp_path, count):
    """Tolerances as in test_mesh.py."""
    expected = load_params(open_model(train(public_run(tmp_path / "one", **STEPS))))
    run = public_run(tmp_path / "many", **STEPS)  # writes the documents
    assert end(start(tmp_path / "many", count)) == [0] * count
    made = load_params(open_model(pathlib.Path(run.out) / "model"))
    for path, leaf in flatten(made).items():
        other = flatten(expected)[path]
        assert np.abs(leaf - other).max() <= 5e-4 * (np.abs(other).max() + 1e-6), path
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), atol=1e-5)


@pytest.mark.slow
def test_one_told_to_stop_stops_all_and_another_number_of_processes_goes_on(tmp_path):
    """SIGTERM to the one that does not lead; the losses are those of a run that was never stopped."""
    steps = 3000
    running = start(tmp_path, 2, steps)
    wait_for_step(tmp_path, 4)
    running[1].terminate()
    assert end(running) == [75, 75]
    stopped = losses(tmp_path)
    assert 4 < len(stopped) < steps
    saved = max(int(path.name) for path in (tmp_path / "public" / "run" / "checkpoints").iterdir())
    assert saved == len(stopped)
    running = start(tmp_path, 4, steps)
    wait_for_step(tmp_path, saved + 5)
    running[0].terminate()
    assert end(running) == [75] * 4
    assert losses(tmp_path)[:saved] == stopped  # kept as they were
    reference = subprocess.Popen(
        [sys.executable, "-c", f"from tests.parallel.test_processes import one_process; "
         f"one_process({str(tmp_path / 'one')!r}, '', {steps})"]
    )  # fmt: skip
    wait_for_step(tmp_path / "one", saved + 3)
    reference.terminate()
    assert end([reference]) == [75]
    # float32 sums in another order, over as many steps of AdamW as were taken
    np.testing.assert_allclose(losses(tmp_path)[: saved + 3], losses(tmp_path / "one")[: saved + 3], atol=1e-3)


@pytest.mark.slow
def test_when_one_dies_the_others_end_soon(tmp_path):
    running = start(tmp_path, 2, 100_000)
    wait_for_step(tmp_path, 4)
    running[1].kill()
    begun = time.monotonic()
    codes = end(running, 120)
    assert codes[0] != 0
    assert time.monotonic() - begun < 3 * processes.HEARTBEAT_S


@pytest.mark.parametrize(
    "environment",
    [
        {processes.COUNT: "two"},
        {processes.COUNT: "2", processes.NUMBER: "2", processes.COORDINATOR: "host:1"},
        {processes.COUNT: "2", processes.NUMBER: "0", processes.COORDINATOR: "host"},
    ],
)
def test_jobs_that_cannot_be_joined_are_refused(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FLEXMOE_PROCESSES is"):
        processes.join()
