"""When a run saves its state."""

import pathlib

from flexmoe_jax.artifacts.package import read_manifest
from flexmoe_jax.training import loop
from tests.tiny import expert_run, random_release


def test_without_an_interval_only_minutes_save(tmp_path):
    release, _ = random_release(tmp_path)
    kept = expert_run(tmp_path / "a", "news", release, save_every=2)
    bare = expert_run(tmp_path / "b", "news", release, save_every=None)
    hurried = expert_run(tmp_path / "c", "news", release, save_every=None, save_minutes=0.0)
    packages = [read_manifest(loop.train(run)).content for run in (kept, bare, hurried)]
    assert len({*packages}) == 1
    saved = [bool([*pathlib.Path(run.out, "digests").glob("*.json")]) for run in (kept, bare, hurried)]
    assert saved == [True, False, True]
    assert loop.train(bare) == pathlib.Path(bare.out, "package")  # there is nothing to resume, and nothing to do
