"""How long the command line takes to begin: help, and a training run's second start (compiled programs are kept)."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.harness import Row, interleaved
from tests.tiny import write_documents, write_vector

HELP_GOAL_S, START_GOAL_S = 0.7, 15.0
ROOT = pathlib.Path(__file__).parents[1]


def run() -> list[Row]:
    command = [pathlib.Path(sys.executable).with_name("flexmoe"), "--help"]
    help_s = interleaved({"help": lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)}, 5)["help"]
    rows = [Row("flexmoe --help", help_s, "s", goal=f"< {HELP_GOAL_S} s", met=help_s < HELP_GOAL_S)]
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        write_documents(home / "data", "public", count=400)
        write_vector(home / "domain.json", 0)
        first, *later = [_train_one_step(home, f"run{n}") for n in range(4)]
    second = float(np.median(later))
    goal = f"< {START_GOAL_S:.0f} s"
    rows.append(Row("pretrain, one step and saved: first start", first, "s"))
    ratio, met = first / second, second < START_GOAL_S
    return [*rows, Row("... second start; peer: the first", second, "s", first, ratio, goal=goal, met=met)]


def _train_one_step(home: pathlib.Path, out: str) -> float:
    config = ROOT / "experiments" / "quickstart_public.py"
    command = [sys.executable, "-m", "flexmoe_jax.cli.main", "pretrain", f"--config={config}", "--config.steps=1"]
    environment = {**os.environ, "FLEXMOE_CACHE": str(home / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    begin = time.perf_counter()
    subprocess.run([*command, f"--config.out={out}"], cwd=home, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin
