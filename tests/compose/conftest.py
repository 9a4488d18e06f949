"""Experts of every kind, trained once for the tests of this folder."""

import pytest

from flexmoe_jax.compose.merge import merge
from flexmoe_jax.training.loop import train
from tests.tiny import contents, expert_run, random_release

RANKS = {"news": "4", "math": None, "code": "w_gate=2,w_down=3"}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """(folder, release, packages): a release, experts of rank 4, whole and with one whole matrix, and their `model`."""
    root = tmp_path_factory.mktemp("kinds")
    release, _ = random_release(root)
    before = contents(release)
    packages = {owner: train(expert_run(root, owner, release, rank=rank)) for owner, rank in RANKS.items()}
    assert contents(release) == before
    merge(release, [*packages.values()], root / "model", top_k=2)
    return root, release, packages
