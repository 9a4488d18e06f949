"""Reproducible property tests, compiled programs shared by test processes, and the fixtures of several folders."""

import os
import signal

from flexmoe_jax.cli.main import use_compilation_cache

# Test processes share compiled programs: the same small training step is compiled once, not thirty times.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
use_compilation_cache()

import pytest
from hypothesis import settings

from flexmoe_jax.model_config import ModelConfig
from tests.tiny import TINY, build_quickstart, build_world

# The same examples on every run: a failure is due to a change of the code. No deadline: the first example compiles.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


# As in a terminal: a runner in the background ignores signals, and so would every process that a test starts.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A trained public release, two experts and their merged model on disk (see `tests/tiny.py`); read only."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_quickstart(tmp_path_factory):
    """A folder that holds `runs/quickstart` of a tiny model (see `tests/tiny.py`), as a clone does; read only."""
    pytest.importorskip("sentence_transformers")
    root = tmp_path_factory.mktemp("clone")
    build_quickstart(root / "runs" / "quickstart")
    return root
