"""Real processes on this machine train what one process trains (`make test-distributed`)."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from flexmoe_jax.artifacts.model_dir import load_params, open_model
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.parallel import processes
from flexmoe_jax.train.loop import train
from flexmoe_jax.tree import flatten
from tests.train.tiny import public_run

STEPS = {"steps": 6, "batch_size": 8}


def one_process(root: str, mesh: str) -> None:
    """What each process runs."""
    processes.join()
    train(dataclasses.replace(public_run(pathlib.Path(root), **STEPS), mesh=mesh))


def losses(root: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "public" / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_trains(tmp_path, count):
    """Tolerances as in test_mesh.py."""
    expected = load_params(open_model(train(public_run(tmp_path / "one", **STEPS))))
    run = public_run(tmp_path / "many", **STEPS)  # writes the documents
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    call = f"one_process({str(tmp_path / 'many')!r}, 'fsdp={count}')"
    code = f"from tests.parallel.test_processes import one_process; {call}"
    running = []
    for number in range(count):
        job = {processes.COUNT: str(count), processes.NUMBER: str(number), processes.COORDINATOR: address}
        running.append(subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **job}))
    assert [process.wait(timeout=300) for process in running] == [0] * count
    made = load_params(open_model(pathlib.Path(run.out) / "model"))
    for path, leaf in flatten(made).items():
        other = flatten(expected)[path]
        assert np.abs(leaf - other).max() <= 5e-4 * (np.abs(other).max() + 1e-6), path
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), atol=1e-5)


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
