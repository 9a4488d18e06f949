"""Launch scripts are short, parse, and with DRY_RUN=1 print the command that they would run."""

import os
import pathlib
import shlex
import subprocess

import pytest

SCRIPTS = sorted((pathlib.Path(__file__).parents[1] / "launch").glob("*.sh"))
ARGUMENTS = ["train", "--config=experiments/quickstart_expert.py:news", "--config.licence=two words"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_dry_run_prints_the_command(script):
    environment = {**os.environ, "DRY_RUN": "1"}
    printed = subprocess.run([script, *ARGUMENTS], env=environment, capture_output=True, text=True, check=True).stdout
    assert shlex.split(printed) == ["flexmoe", *ARGUMENTS]
    assert len(script.read_text().splitlines()) < 80


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_script_requeues_exactly_a_stopped_training(tmp_path, code):
    """With stand-ins for `flexmoe` and `scontrol` that note how they were called."""
    for name, lines in {"flexmoe": f"exit {code}", "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    script = SCRIPTS[-1]
    assert script.name == "slurm_one_gpu.sh"
    finished = subprocess.run([script, *ARGUMENTS], env=environment, cwd=tmp_path, check=False)
    assert finished.returncode == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text().strip() if requeued.exists() else "") == ("requeue 17" if code == 75 else "")


def test_the_slurm_script_passes_sigterm_on_and_waits(tmp_path):
    """The training takes a moment to save after SIGTERM; its exit code is the one that counts."""
    training = "trap 'sleep 0.5; exit 75' TERM\ntouch started\nwhile :; do sleep 0.05; done"
    for name, lines in {"flexmoe": training, "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    process = subprocess.Popen([SCRIPTS[-1], *ARGUMENTS], env=environment, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "requeued").read_text().strip() == "requeue 17"
