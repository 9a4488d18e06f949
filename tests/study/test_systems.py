"""The table of systems: every name once, after what it is made from, at the costs that were published."""

import dataclasses
import pathlib

import numpy as np
import pytest

from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.results import Kind, read_results
from flexmoe_jax.study.scoring import Bench, SystemScore, Text, Texts, tuned_mixture
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.train import train_seed
from flexmoe_jax.study.workshop import Artifacts, Workshop
from flexmoe_jax.tree import PUBLIC
from tests.study.tiny import CONFIG

RESULTS = pathlib.Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", ["reproduction-small", "seven_owners"])
def test_published_systems_are_those_of_the_table(name):
    [study] = read_results(RESULTS / f"{name}.jsonl")
    if "rates" not in study.config:
        pytest.skip(
            "of a study with other costs and ablations, to be measured again: its learning rates were not chosen"
        )
    config = from_mapping(StudyConfig, study.config)
    table = [(s.name, s.kind, list(s.experts), s.forward_flops(config), s.training_flops) for s in systems(config)]
    assert table == [
        (row.name, row.kind, row.experts, row.forward_flops_per_token, row.training_flops_after_public)
        for row in study.systems
    ]


@pytest.mark.parametrize("domains", ["news", "math,news", "code,math,news", "academic,code,creative,math,news"])
def test_names_are_unique_and_one_system_is_the_method(domains):
    table = systems(dataclasses.replace(CONFIG, domains=domains))
    assert len({system.name for system in table}) == len(table)
    assert [system.name for system in table if system.kind == Kind.METHOD] == [METHOD]


def test_a_study_of_the_method_has_a_part_of_all_systems_in_the_same_order():
    config = dataclasses.replace(CONFIG, domains="code,math,news")
    some = [system.name for system in systems(dataclasses.replace(config, systems="method"))]
    every = [system.name for system in systems(config)]
    assert every[: len(some)] == some
    assert len(some) < len(every)


def test_systems_are_left_out_by_their_whole_names():
    every = [system.name for system in systems(CONFIG)]
    some = systems(dataclasses.replace(CONFIG, leave_out="unrestricted 2x|FlexMoE, rows.*|BT"))
    gone = {"unrestricted 2x", "FlexMoE, rows x 2", "FlexMoE, rows / 2"}
    assert [system.name for system in some] == [name for name in every if name not in gone]
    assert gone < set(every)


def test_training_finds_the_models_it_starts_from(tmp_path, monkeypatch):
    started = {}

    def trained(self, name, *, owner, text, steps, **changes):
        started[name] = changes["public"]
        return pathlib.Path(name)

    monkeypatch.setattr(Workshop, "train", trained)
    monkeypatch.setattr(Workshop, "made", lambda self, name, make: pathlib.Path(name))
    monkeypatch.setattr(Workshop, "tokens", lambda self, text, release: pathlib.Path(text))
    monkeypatch.setattr(Workshop, "at_norm", lambda self, release, scale: release)
    monkeypatch.setattr(Workshop, "_tuned", lambda self, name, model, together: model)
    config = dataclasses.replace(CONFIG, domains="code,math,news", rates="2e-3")
    train_seed(config, tmp_path, pathlib.Path("release"), tmp_path, 0, artifacts := Artifacts({}))
    models = artifacts.models
    trained_systems = [system.name for system in systems(config) if system.training is not None]
    assert list(models) == [PUBLIC, *trained_systems]
    assert started["dense code"] == started["frozen trunk news"] == f"{models[PUBLIC]}" == "release"
    assert started["BTX"] == "BTX start"
    assert started["unrestricted 1x"] == started["unrestricted 2x"] == "upcycled"
    assert started[f"{METHOD}, biases fitted on public text"] == f"merged {METHOD}"
    assert models[f"{METHOD}, tuned together"] == pathlib.Path(f"merged {METHOD}")


def test_mixtures_find_the_scores_of_the_public_model_and_of_the_dense_experts(tmp_path):
    some = {"public": [Text("a", "1"), Text("b", "2")], "code": [Text("c", "3")]}
    texts = Texts(some, some)
    nats = {PUBLIC: 4.0, "dense code": 1.0, "dense math": 2.0, "dense news": 3.0, "frozen trunk math": 2.5}

    class Scored(Bench):
        def kept(self, name, score):
            value = nats.get(name.removesuffix(", validation"), 9.0)
            return SystemScore(
                {domain: [np.full(3, value) for _ in some] for domain, some in texts.heldout.items()}, {}
            )

        posteriors = {  # noqa: RUF012 - stands in for a cached property
            "public": np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]),
            "code": np.eye(4)[2:3],
        }

    config = dataclasses.replace(CONFIG, domains="code,math,news")
    bench = Scored(config, Artifacts({}), texts, tmp_path, tmp_path)
    for system in systems(config):
        bench.scores[system.name] = system.score(bench)
    means = {name: [doc.mean() for doc in score.nats["public"]] for name, score in bench.scores.items()}
    assert means["oracle dense expert"] == [1.0, 1.0]
    assert means["oracle expert, frozen trunk"] == [2.5, 2.5]
    assert means["prompt routing"] == [3.0, 4.0]
    assert 1.0 < means["BTM"][0] < means["causal BTM"][0] < 4.0


def test_a_mixtures_number_is_chosen_on_validation_text_domain_by_domain(tmp_path):
    texts = {"math": [Text("a", "1")], "news": [Text("b", "2")]}

    class Scored(Bench):
        def kept(self, name, score):
            best = {"math": 0.5, "news": 0.9}
            return SystemScore({d: [np.array([b])] for d, b in best.items()}, {})

    bench = Scored(CONFIG, Artifacts({}), Texts(texts, texts), tmp_path, tmp_path)
    bench.scores["one"] = SystemScore({domain: [np.array([7.0])] for domain in texts}, {})
    distance = tuned_mixture(["one"], lambda nats, number: [abs(nats["one"][0] - number)], [0.6, 0.8, 1.0])
    found = distance(bench)
    assert found.chosen == {"math": 0.6, "news": 0.8}
    assert {domain: some[0][0] for domain, some in found.nats.items()} == pytest.approx({"math": 6.4, "news": 6.2})


def test_systems_that_see_the_text_they_score_say_so():
    """Those that choose or weigh models by the text itself, and by nothing before it."""
    config = dataclasses.replace(CONFIG, domains="code,math,news")
    assert {system.name for system in systems(config) if system.sees_text} == {
        "BTM",
        "BTM, top-2",
        "prompt routing",
        "weighted soup",
        "oracle dense expert",
        "oracle expert, frozen trunk",
    }


def test_runs_of_different_systems_have_different_folders(tmp_path):
    config = dataclasses.replace(CONFIG, domains="code,math,news")
    workshop = Workshop(config, tmp_path, tmp_path, 0)
    runs = [
        path
        for system in systems(config)
        if system.training is not None
        for path in workshop.runs(system.name, system.training).values()
    ]
    assert len(set(runs)) == len(runs) == 61
    assert tmp_path / "runs" / "dense_code" in runs
    assert tmp_path / "runs" / "the_papers_training_news" in runs
