"""Jobs of several processes on this machine, for tests."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time

from flexmoe_jax.config import RunConfig
from flexmoe_jax.parallel import processes
from flexmoe_jax.training import loop

HERE = "from tests.parallel.jobs import train_in_process; from flexmoe_jax.config import *; "


def train_in_process(run: RunConfig) -> None:
    """Trains `run` in one process of a job; exits like the command line, and notes in `writers` that it wrote."""
    processes.join()
    write = loop._write_product

    def noted(product, *rest):
        write(product, *rest)
        with (pathlib.Path(run.out) / "writers").open("a") as file:
            file.write(f"{processes.is_lead()}\n")

    loop._write_product = noted
    try:
        loop.train(run)
    except loop.Stopped as stopped:
        sys.exit(stopped.exit_code)


def start_training(run: RunConfig, count: int, mesh: str = "") -> list[subprocess.Popen]:
    """`run` by `count` processes; by default all devices are on the `fsdp` axis."""
    run = dataclasses.replace(run, mesh=mesh or f"fsdp={count}")
    return start([sys.executable, "-c", f"{HERE}train_in_process({run!r})"], count)


def start_verb(arguments: list, count: int) -> list[subprocess.Popen]:
    """`flexmoe ARGUMENTS` by `count` processes, with captured output."""
    return start([sys.executable, "-m", "flexmoe_jax.cli.main", *map(str, arguments)], count, stdout=subprocess.PIPE)


def start(command: list[str], count: int, **options) -> list[subprocess.Popen]:
    """`count` processes of one job, each with one device; a single process does not join a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    names, running = (processes.COUNT, processes.NUMBER, processes.COORDINATOR), []
    for number in range(count):
        job = dict(zip(names, (str(count), str(number), address), strict=True)) if count > 1 else {}
        running.append(subprocess.Popen(command, env={**os.environ, **job}, text=True, **options))
    return running


def end(running: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    """The exit codes of the processes; kills those that still run after `seconds`."""
    try:
        return [process.wait(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()


def printed(running: list[subprocess.Popen], seconds: float = 300) -> list[str]:
    """The output of each process, without lines of Gloo; all must exit with 0."""
    found = [process.communicate(timeout=seconds)[0] for process in running]
    assert end(running) == [0] * len(running)
    return ["".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]")) for text in found]


def wait_for_step(run: RunConfig, step: int) -> None:
    """Returns when the metrics of `step` are written; fails after 200 seconds."""
    path, deadline = pathlib.Path(run.out) / "metrics.jsonl", time.monotonic() + 200
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, f"the job did not reach step {step} in time"
        time.sleep(0.02)
