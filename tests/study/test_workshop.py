"""What a study's runs train on: as much of an owner's text in every system, in the dtype that the study names."""

import dataclasses
import json
import pathlib

import pytest

from flexmoe_jax.study import workshop
from flexmoe_jax.study.config import ABLATIONS
from flexmoe_jax.study.systems import METHOD
from flexmoe_jax.study.train import train_seed
from flexmoe_jax.study.workshop import Artifacts, Workshop
from flexmoe_jax.tree import PUBLIC
from tests.study.tiny import CONFIG
from tests.tiny import MODEL, random_release, write_documents, write_vector

STUDY = dataclasses.replace(
    CONFIG, domains="news", model=MODEL, rates="4e-3", owner_steps=3, seq_len=32, systems="method"
)
TRIED = ("the paper's training", "paper without coordination + public text + small rows")


@pytest.fixture
def shared(tmp_path):
    """The folder of a study of tiny documents, before its first training."""
    for name in (PUBLIC, *STUDY.owners):
        write_documents(tmp_path / "mix" / name, name)
        write_documents(tmp_path / "mix" / name, name, count=8, split="heldout")
        (tmp_path / "domains").mkdir(exist_ok=True)
        write_vector(tmp_path / "domains" / f"{name}.json", len(name))
    return tmp_path


def own_tokens(run: pathlib.Path) -> tuple[int, int]:
    """(steps, tokens of own text) that a run's record counts."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return last["step"] + 1, last["seen"]["own"]["tokens"]


def test_every_system_sees_as_much_of_an_owners_text(shared):
    public, _ = random_release(shared)
    artifacts = Artifacts({})
    train_seed(STUDY, shared, public, shared / "seed-0", 0, artifacts)
    work = Workshop(STUDY, shared, shared / "seed-0", 0)
    for name in TRIED:
        work.make(name, ABLATIONS[name], artifacts)
    runs = shared / "seed-0" / "runs"
    names = (METHOD, "dense", "frozen_trunk", *map(workshop.folder_name, TRIED))
    assert {own_tokens(runs / f"{name}_news") for name in names} == {(3, 3 * 6 * 32)}


def test_every_run_has_the_studys_dtype_and_rate(shared, monkeypatch):
    runs, tunings = [], []

    def trained(run):
        runs.append(run)
        return pathlib.Path(run.out)

    monkeypatch.setattr(workshop, "train", trained)
    monkeypatch.setattr(workshop, "tune", lambda *arguments: tunings.append(arguments[-1]))
    monkeypatch.setattr(Workshop, "made", lambda self, name, make: pathlib.Path(name))
    monkeypatch.setattr(Workshop, "tokens", lambda self, text, release: pathlib.Path(text))
    monkeypatch.setattr(Workshop, "at_norm", lambda self, release, scale: release)
    config = dataclasses.replace(STUDY, compute_dtype="bfloat16", systems="all")
    train_seed(config, shared, pathlib.Path("release"), shared / "seed-0", 0, Artifacts({}))
    assert {run.compute_dtype for run in runs} == {tuning.compute_dtype for tuning in tunings} == {"bfloat16"}
    assert {run.optimizer.lr for run in runs} == {tuning.lr for tuning in tunings} == {4e-3}
    fast = {run.out.rpartition("/")[2] for run in runs if run.optimizer.groups == "experts/.*/bias lr=10"}
    assert fast == {"fast_biases_news", "FlexMoE_biases_fitted_on_public_text"}
