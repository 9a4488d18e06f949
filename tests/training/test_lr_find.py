"""`flexmoe lr-find`: short runs at several rates, fairly compared, that leave no trace."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.cli.main import main
from flexmoe_jax.errors import DataError
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training import loop
from flexmoe_jax.training import lr_find as module
from flexmoe_jax.training.lr_find import Trial, choose, find_rate
from tests.tiny import expert_run, public_run, write_documents

ABSURD = 1e4


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    """A trained public release, shared by the module; tests must not change it."""
    return loop.train(public_run(tmp_path_factory.mktemp("world"), steps=1))


def mixed_run(root: pathlib.Path, release: pathlib.Path, **changes):
    """An owner's run with public text beside its own, and held-out text of both."""
    public = write_documents(root / "sample", "public")
    write_documents(public, "public", count=6, split="heldout")
    run = expert_run(root, "news", release, steps=60, public_data=str(public), public_fraction=0.25)
    write_documents(pathlib.Path(run.data), "news", count=6, split="heldout")
    return dataclasses.replace(run, **changes)


def test_an_absurd_rate_is_never_chosen_and_one_compiled_step_trains_all(release, tmp_path, monkeypatch):
    """The step of a rate in the state is that of a run configured with it: the scores are those of such a run."""
    make, steps = module.make_train_step, []
    monkeypatch.setattr(module, "make_train_step", lambda *args: steps.append(make(*args)) or steps[-1])
    run = mixed_run(tmp_path, release)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sweep = find_rate(run, [1e-4, 1e-2, ABSURD], steps=6)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not pathlib.Path(run.out).exists()
    assert [trial.rate for trial in sweep.trials] == [1e-4, 1e-2, ABSURD]
    assert sweep.chosen == 1e-2
    absurd = sweep.trials[-1]
    assert absurd.bad_steps or not absurd.losses["own"] < sweep.before.losses["own"]
    assert set(absurd.losses) == {"own", "public"}
    assert (sweep.scored["own"], sweep.unit) == ("6 held-out documents", "bits per byte")
    [step] = steps
    assert step._cache_size() == 1

    usual = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, schedule_steps=6)  # 1 of 60 steps is 0 of 6
    trained = load_package(loop.train(dataclasses.replace(run, steps=6, optimizer=usual)))
    short = find_rate(dataclasses.replace(run, out=str(tmp_path / "other")), [1e-2], steps=6)
    assert short.trials[0] == sweep.trials[1]  # the same batches, whatever else is compared
    public = load_package(release / "public")
    again = dataclasses.replace(run, expert=str(tmp_path / "news" / "run" / "package"), domain_vector=None)
    scored = find_rate(again, [1e-9], steps=1).before
    # Float32: the rate multiplies the update in another order.
    assert scored.losses["own"] == pytest.approx(sweep.trials[1].losses["own"], rel=1e-5)
    assert not np.array_equal(trained["w_up"], public["w_up"])


def test_without_held_out_text_windows_that_no_trial_reads_are_scored(release, tmp_path, monkeypatch):
    """Every window of the training text is known by its tokens: those that train and those that are scored differ."""
    seen: dict[str, list] = {"trained": [], "scored": []}
    make, loss = module.make_train_step, module._loss

    def recording(*args):
        step = make(*args)
        return lambda state, frozen, batch: (
            seen["trained"].append(np.asarray(batch.tokens)) or step(state, frozen, batch)
        )

    def scored(decoder, trainable, frozen, batch):
        counts = np.asarray(batch.weights).any(1)
        seen["scored"].append(np.asarray(batch.tokens)[counts])
        return loss(decoder, trainable, frozen, batch)

    monkeypatch.setattr(module, "make_train_step", recording)
    monkeypatch.setattr(module, "_loss", scored)
    run = expert_run(tmp_path, "news", release, steps=60, eval_bytes=1000)
    sweep = find_rate(run, [1e-2], steps=3)
    assert sweep.scored["own"] == "8 windows of the training text that no trial reads"
    assert sweep.unit == "nats per token"
    rows = {name: {tuple(row) for batch in batches for row in batch.tolist()} for name, batches in seen.items()}
    assert len(rows["trained"]) == 3 * 4
    assert rows["scored"]
    assert not rows["trained"] & rows["scored"]
    with pytest.raises(DataError, match="leave too few windows of own unread: 8 are scored") as refusal:
        find_rate(run, [1e-2], steps=400)
    assert "config.holdout" in refusal.value.remedy


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_trial_whose_warm_up_rounds_to_no_step_trains(release, tmp_path, schedule):
    """1 of 60 steps is 0 of 2."""
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1, schedule=schedule)
    sweep = find_rate(
        expert_run(tmp_path, "news", release, steps=60, eval_bytes=1000, optimizer=optimizer), [1e-2], steps=2
    )
    assert sweep.trials[0].losses["own"] != sweep.before.losses["own"]


def test_the_choice_is_the_lowest_own_loss_of_what_stayed_finite_and_helped():
    def trial(rate: float, own: float, bad: int = 0, public: float = 1.0) -> Trial:
        return Trial(rate, bad, {"own": own, "public": public})

    before = trial(0.0, 3.0)
    trials = [trial(1e-4, 2.5), trial(1e-3, 2.0, public=9.0), trial(1e-2, 1.0, bad=1), trial(1e-1, math.nan)]
    assert choose(before, trials) == 1e-3
    assert choose(before, [trial(1e-3, 3.5), trial(1e-2, math.inf)]) is None


def test_scored_rows_count_once():
    batch = jax.tree.map(
        lambda leaf: leaf, module.Batch(*(np.ones((5, 4), np.int32) for _ in range(3)), np.ones((5, 4)))
    )
    parts = module._cut(batch, 2)
    assert [part.tokens.shape for part in parts] == [(2, 4)] * 3
    assert sum(part.weights.sum() for part in parts) == 5 * 4


def write_experiment(path: pathlib.Path, run) -> str:
    source = (
        f"from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({to_mapping(run)!r})\n"
    )
    path.write_text(source, encoding="utf-8")
    return f"--config={path}"


def test_the_verb_prints_a_table_and_the_choice_and_says_what_diverged(release, tmp_path, capsys):
    experiment = write_experiment(tmp_path / "exp.py", mixed_run(tmp_path, release))
    assert main(["lr-find", experiment, "--steps=6", f"--rates=1e-2,{ABSURD},1e-4"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["rate", "own", "loss", "public", "loss"]
    assert [line.split()[0] for line in lines[2:6]] == ["untrained", "0.0001", "0.01", "10000"]
    assert lines[4].endswith("chosen")
    assert "worse than untrained" in lines[5] or "diverged" in lines[5]
    assert "chosen: --config.optimizer.lr=0.01, the lowest own loss after 6 steps" in printed
    assert "6 of 60 steps are a short run" in printed
    assert main(["lr-find", experiment, "--steps=2", f"--rates={ABSURD}", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["chosen"] is None
    assert "remedy: give lower --rates" in captured.err
    assert main(["lr-find", experiment, "--rates=1e-3,x"]) == 1
    assert "a rate to compare: it is 'x'" in capsys.readouterr().err
