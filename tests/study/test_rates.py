"""Learning rates are the best on validation text, searched once, with the first seed, and never on reported text."""

import dataclasses
import json
import logging
import pathlib
import types

import pytest

from flexmoe_jax.errors import BusyError, DivergedError, FlexMoEError
from flexmoe_jax.study import rates
from flexmoe_jax.study.rates import FILE, searches
from flexmoe_jax.study.results import RateSearch
from flexmoe_jax.study.scoring import held_out
from flexmoe_jax.study.systems import METHOD
from flexmoe_jax.study.train import train_seed
from flexmoe_jax.study.workshop import Artifacts, Joint, Workshop
from flexmoe_jax.tree import PUBLIC
from tests.study.tiny import CONFIG

STUDY = dataclasses.replace(
    CONFIG, domains="code,news", ablations="no bias", rates="3e-3,5e-4,1.5e-3", owner_steps=30, tune_steps=4
)
BEST = {METHOD: 1.5e-3, "dense code": 3e-3, "dense news": 3e-3, "frozen trunk code": 5e-4, "BTX": 1.5e-3}


@pytest.fixture
def studio(monkeypatch, tmp_path):
    """A study whose models are their names and rates; `made` lists (name, rate, steps, folder) of each training.

    A model scores as many bits per byte as its rate is away from the best, in multiples of it; `scored` lists
    (name, experts, text).
    """
    made, scored, broken = [], [], {}

    def make(self, name, training, artifacts):
        steps = training.steps if isinstance(training, Joint) else self.config.owner_steps
        if error := broken.get((name, self.rate)):
            raise error
        made.append((name, self.rate, steps, self.home.name))
        if len(made) == 1:
            studio.meanwhile()
        return pathlib.Path(f"{name}@{self.rate}")

    def load(path):
        def model(experts):
            def score(texts, seq_len):
                scored.append((name, experts, *texts))
                return types.SimpleNamespace(bits_per_byte=abs(float(rate) / BEST.get(name, 1.5e-3) - 1))

            return types.SimpleNamespace(score=score, select=model)

        name, rate = str(path).split("@")
        return model("all")

    monkeypatch.setattr(Workshop, "make", make)
    monkeypatch.setattr(Workshop, "at_norm", lambda self, release, scale: release)
    monkeypatch.setattr(rates, "load", load)
    for name in (PUBLIC, *STUDY.owners):
        (tmp_path / "mix" / name).mkdir(parents=True)
        rows = [json.dumps({"text": f"{name} {n}"}) for n in range(4)]
        (tmp_path / "mix" / name / "heldout.jsonl").write_text("\n".join(rows))

    def study(seed=0, config=STUDY):
        train_seed(config, tmp_path, pathlib.Path("release"), tmp_path / f"seed-{seed}", seed, Artifacts({}))

    studio = types.SimpleNamespace(made=made, scored=scored, broken=broken, root=tmp_path)
    studio.run, studio.meanwhile = study, lambda: None
    return studio


def test_every_seed_trains_at_the_best_rate_and_only_the_first_searches(studio):
    studio.run(0)
    final = {name: rate for name, rate, _, folder in studio.made if folder == "seed-0"}
    assert {name: final[name] for name in BEST} == BEST
    assert final["dense code"] == final["dense news"]
    trials = [(name, steps) for name, _, steps, folder in studio.made if folder != "seed-0"]
    assert trials.count((METHOD, 10)) == trials.count(("dense news", 10)) == trials.count(("BTX", 34)) == 3
    assert len(trials) == 3 * len(final)
    studio.made.clear()
    studio.run(1)
    assert {name: rate for name, rate, _, folder in studio.made if folder == "seed-1"} == final
    assert len(studio.made) == len(final)


def test_another_seed_waits_for_the_search_of_the_first(studio):
    with pytest.raises(BusyError, match="has no learning rate of"):
        studio.run(1)
    assert studio.made == []


def test_a_trial_keeps_what_other_processes_added_meanwhile(studio):
    """The whole table is written by every trial."""
    other = {"soup of another process": {"0.0005": 1.0}}
    studio.meanwhile = lambda: (studio.root / FILE).write_text(json.dumps(other))
    studio.run()
    assert {"soup of another process", METHOD, "dense"} <= {*searches(studio.root)}


def test_owners_text_chooses_for_owners_and_every_domain_for_what_is_trained_jointly(studio):
    studio.run()
    texts = {name: {row[1:] for row in studio.scored if row[0] == name} for name in (METHOD, "dense code", "BTX")}
    assert texts[METHOD] == {((PUBLIC, owner), f"{owner} 0") for owner in STUDY.owners}
    assert texts["dense code"] == {("all", "code 0")}
    assert texts["BTX"] == {("all", f"{name} 0") for name in (PUBLIC, *STUDY.owners)}


def test_validation_text_is_not_reported(studio):
    folder = studio.root / "mix" / "news"
    assert [document.text for document in held_out(folder)] == ["news 1", "news 2", "news 3"]
    assert [document.text for document in held_out(folder, validation=True)] == ["news 0"]


def test_a_search_that_stopped_goes_on_where_it_was(studio):
    studio.broken["dense news", 1.5e-3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        studio.run()
    before = [row[:2] for row in studio.made]
    assert ("dense news", 5e-4) in before
    studio.made.clear()
    studio.broken.clear()
    studio.run()
    trials = [row[:2] for row in studio.made if not row[3].startswith("seed")]
    assert trials[:4] == [("dense code", 1.5e-3), ("dense news", 1.5e-3), ("dense code", 3e-3), ("dense news", 3e-3)]
    assert ("dense news", 5e-4) not in trials


def test_a_rate_at_the_end_is_told_and_one_that_diverges_is_never_taken(studio, caplog):
    caplog.set_level(logging.INFO, "flexmoe_jax.study")
    studio.broken["dense news", 3e-3] = DivergedError("too high")
    studio.run()
    found = searches(studio.root)
    assert found["dense"].bits_per_byte["0.003"] is None
    assert (found["dense"].chosen, found["dense"].at_end) == (1.5e-3, False)
    assert found[METHOD] == RateSearch({"0.0005": pytest.approx(2 / 3), "0.0015": 0.0, "0.003": 1.0}, 1.5e-3, False)
    assert found["frozen trunk"].at_end
    [told] = [line for line in caplog.messages if line.startswith("learning rates of frozen trunk")]
    assert "train at 0.0005, an end of config.rates" in told
    [told] = [line for line in caplog.messages if line.startswith("learning rates of dense")]
    assert "0.003 diverged; all seeds train at 0.0015" in told
    assert "an end" not in told


def test_where_every_rate_diverges_the_study_says_so(studio):
    studio.broken |= {(METHOD, rate): DivergedError("too high") for rate in STUDY.grid}
    with pytest.raises(FlexMoEError, match=r"FlexMoE diverged at every learning rate: 0\.0005, 0\.0015, 0\.003"):
        studio.run()


def test_a_single_rate_is_not_searched(studio):
    studio.run(config=dataclasses.replace(STUDY, rates="2e-3"))
    assert {row[1] for row in studio.made} == {2e-3}
    assert {row[3] for row in studio.made} == {"seed-0"}
    assert not (studio.root / FILE).exists()
    assert searches(studio.root) == {}
