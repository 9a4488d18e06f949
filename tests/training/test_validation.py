"""A run that is watched: held-out text, the best step, early stop, means of windows, and what a line says."""

import dataclasses
import itertools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.data import sources
from flexmoe_jax.data.records import Fields
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.errors import ArtifactError, ConfigError, DataError
from flexmoe_jax.evaluate.perplexity import heldout_texts
from flexmoe_jax.training import loop, validation
from flexmoe_jax.training.metrics import OF_TIME, SPIKE_LEAST, Window
from flexmoe_jax.training.validation import Progress, held_out
from tests.tiny import expert_run, public_run, write_documents


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    """A trained public release, shared by the module; tests must not change it."""
    return loop.train(public_run(tmp_path_factory.mktemp("world")))


def lines_of(run) -> list[dict]:
    lines = [json.loads(line) for line in (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]


def watched(root: pathlib.Path, release: pathlib.Path, **changes):
    """An owner's run with held-out text of its own and public text, trained and held out."""
    run = expert_run(root, "news", release, public_data=str(root / "sample"), public_fraction=0.5, eval_every=2)
    write_documents(root / "sample", "public")
    for folder, domain in ((run.data, "news"), (run.public_data, "public")):
        write_documents(pathlib.Path(folder), domain, count=6, split="heldout")
    return dataclasses.replace(run, **changes)


def script(monkeypatch, *bits: float) -> None:
    """The validations of this process find these own bits per byte, one after another."""
    found = iter(bits)
    monkeypatch.setattr(loop.Validation, "measure", lambda self, params: {"own": next(found)})


def test_the_last_validation_equals_the_score_of_the_product(release, tmp_path):
    """By the public API, in the pair {public, news}: the same text, windows and weights (sums in float32: 1e-5)."""
    run = watched(tmp_path, release)
    package = loop.train(run)
    found = [line for line in lines_of(run) if "validation" in line]
    assert [line["step"] for line in found] == [1, 3, 5]
    model = load(merge(release, [package], tmp_path / "model").path)
    for name, folder in (("own", run.data), ("public", run.public_data)):
        texts = heldout_texts(pathlib.Path(folder), run.eval_bytes)
        assert found[-1]["validation"][name] == pytest.approx(model.score(texts).bits_per_byte, rel=1e-5)
    assert found[0]["validation"]["own"] > found[-1]["validation"]["own"]


def test_validation_changes_no_bit_of_the_product(release, tmp_path):
    run = watched(tmp_path / "a", release)
    blind = dataclasses.replace(watched(tmp_path / "b", release), eval_every=None, track=None)
    assert read_manifest(loop.train(run)).content == read_manifest(loop.train(blind)).content
    assert not (pathlib.Path(blind.out) / "tensorboard").exists()
    assert not any("validation" in line for line in lines_of(blind))


def test_the_best_weights_are_published_and_outlive_the_newest_checkpoints(release, tmp_path, monkeypatch, caplog):
    """They equal the product of a run that ends there (its schedule is that of this run: the rate is constant)."""
    caplog.set_level("INFO", "flexmoe_jax")
    flat = {"optimizer": dataclasses.replace(public_run(tmp_path).optimizer, warmup_steps=0, end_lr_fraction=1.0)}
    run = watched(tmp_path / "a", release, steps=10, save_every=1, publish="best", **flat)
    script(monkeypatch, 3.0, 2.0, 2.5, 2.5, 2.5)
    training = read_manifest(package := loop.train(run)).record.training
    assert (training["steps"], training["published"], training["heldout_bits_per_byte"]) == (4, "best", 2.0)
    assert training["tokens"] == 4 * run.batch_size * run.seq_len
    assert sorted(int(path.stem) for path in (pathlib.Path(run.out) / "digests").iterdir()) == [4, 9, 10]
    assert any("published are the weights after step 4" in line for line in caplog.messages)
    short = watched(tmp_path / "b", release, steps=4, eval_every=None, **flat)
    expected = load_package(loop.train(short))
    assert all((expected[leaf] == value).all() for leaf, value in load_package(package).items())
    last = dataclasses.replace(run, publish="last")  # the other choice, without training again
    shutil.rmtree(package)
    assert read_manifest(loop.train(last)).record.training["steps"] == 10


def test_however_many_validations_are_better_at_most_one_checkpoint_is_kept_besides(release, tmp_path, monkeypatch):
    """And while a better one is saved, the one before."""
    run = watched(tmp_path, release, steps=12, eval_every=1, save_every=100, publish="best")
    script(monkeypatch, *(9.0 - n for n in range(11)), 9.0)
    assert read_manifest(loop.train(run)).record.training["steps"] == 11
    assert len(list((pathlib.Path(run.out) / "digests").iterdir())) <= 2 + 1


@pytest.mark.parametrize("damage", ["another choice at the start", "lost files"])
def test_best_weights_that_are_not_kept_are_said_and_not_published(release, tmp_path, monkeypatch, caplog, damage):
    """With the choice of the last weights, none were kept; the remedy publishes those."""
    caplog.set_level("INFO", "flexmoe_jax")
    first = "last" if damage == "another choice at the start" else "best"
    run = watched(tmp_path, release, steps=6, eval_every=2, save_every=1, keep_checkpoints=1, publish=first)
    script(monkeypatch, 2.0, 3.0, 3.0)
    package = loop.train(run)
    shutil.rmtree(package)
    shutil.rmtree(pathlib.Path(run.out) / "checkpoints" / "2", ignore_errors=True)
    with pytest.raises(ArtifactError, match="publish is 'best', and of no step are a finite score and") as refusal:
        loop.train(dataclasses.replace(run, publish="best"))
    assert any("of step 2, are not kept: the search" in line for line in caplog.messages)
    assert "--config.publish=last" in refusal.value.remedy
    assert read_manifest(loop.train(dataclasses.replace(run, publish="last"))).record.training["steps"] == 6


def test_an_early_end_writes_the_line_of_its_last_steps(release, tmp_path, monkeypatch):
    run = watched(tmp_path, release, steps=100, log_every=10, eval_every=2, patience=1)
    script(monkeypatch, 2.0, math.nan)
    loop.train(run)
    (line,) = [line for line in lines_of(run) if "loss" in line]
    assert (line["step"], line["steps"]) == (3, 4)
    assert [line["validation"] for line in lines_of(run) if "validation" in line] == [{"own": 2.0}, {"own": None}]


def test_too_many_skipped_steps_of_a_run_that_ended_early_publish_nothing(release, tmp_path, monkeypatch):
    run = watched(tmp_path, release, steps=1000, eval_every=2, patience=1)
    script(monkeypatch, 2.0, 3.0)
    place, calls = loop.place_batch, itertools.count()

    def placed(mesh, batch):
        bad = next(calls) == 1
        return place(mesh, dataclasses.replace(batch, weights=batch.weights * np.float32(np.nan)) if bad else batch)

    monkeypatch.setattr(loop, "place_batch", placed)
    with pytest.raises(DataError, match="1 of 4 steps were skipped"):
        loop.train(run)


def test_a_score_that_is_not_finite_is_never_the_best():
    progress = Progress("")
    assert [progress.add(step, bits) for step, bits in ((1, math.nan), (2, 3.0), (3, math.nan), (4, 2.0))] == [
        False,
        True,
        False,
        True,
    ]


def test_training_ends_when_patience_does_and_a_resumed_run_knows(release, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "flexmoe_jax")
    run = watched(tmp_path, release, steps=100, eval_every=1, patience=3, publish="best", save_every=100)
    script(monkeypatch, 3.0, 2.0, 2.1, 2.0, 2.2)
    package = loop.train(run)
    assert read_manifest(package).record.training["steps"] == 2
    assert lines_of(run)[-1]["step"] == 4
    assert "no better score in 3 validations: training ends; the best is that after step 2" in caplog.messages
    shutil.rmtree(package)  # as if the process had died before it was written
    assert read_manifest(loop.train(run)).record.training["steps"] == 2  # no validation is left in the script


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(release, tmp_path, monkeypatch):
    """Means of windows, validations and the best step; the stop is in the middle of a window of five steps."""
    how = {"steps": 12, "log_every": 5, "eval_every": 3, "save_every": 4, "publish": "best"}
    whole, halved = (watched(tmp_path / name, release, **how) for name in "ab")
    expected = read_manifest(loop.train(whole))
    make = loop.make_train_step

    def dying(*args):
        step, calls = make(*args), itertools.count()
        return lambda *inputs: step(*inputs) if next(calls) < 7 else (_ for _ in ()).throw(RuntimeError)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", dying)
        with pytest.raises(RuntimeError):
            loop.train(halved)
    found = read_manifest(loop.train(halved))
    assert (found.content, found.record.training) == (expected.content, expected.record.training)
    assert lines_of(halved) == lines_of(whole)
    assert [line["steps"] for line in lines_of(whole) if "steps" in line] == [5, 5, 2]


def test_a_line_has_the_means_of_its_steps_and_own_and_public_loss_apart(release, tmp_path):
    each, window = (watched(tmp_path / str(n), release, log_every=n) for n in (1, 6))
    for run in (each, window):
        loop.train(run)
    singles = [line for line in lines_of(each) if "loss" in line]
    (line,) = [line for line in lines_of(window) if "loss" in line]
    for key in ("loss", "own_loss", "public_loss", "grad_norm", "z_loss"):
        assert line[key] == pytest.approx(np.mean([single[key] for single in singles]), rel=1e-6)  # float64 means
    assert line["lr"] == singles[-1]["lr"]
    assert line["loss"] == pytest.approx((line["own_loss"] + line["public_loss"]) / 2, rel=1e-5)  # half the rows each
    assert abs(line["own_loss"] - line["public_loss"]) > 0.01
    assert set(line["grad_norms"]) == set(line["update_norms"]) == {"matrices", "rows", "biases"}
    whole = math.sqrt(sum(single**2 for single in singles[-1]["grad_norms"].values()))
    assert whole == pytest.approx(singles[-1]["grad_norm"], rel=1e-5)
    assert len(line["share_by_layer"]["news"]) == len(line["router_accuracy"]) == 2
    rows, windows = 2, 6 * 2 / (line["seen"]["own"]["epochs"])
    assert line["seen"]["own"]["tokens"] == 6 * rows * run.seq_len
    assert windows == pytest.approx(round(windows))  # the number of windows of the store


@pytest.mark.parametrize("rank", [None, "w_gate=4,w_down=2"])
def test_the_distance_is_that_of_the_matrices_from_the_public_ones(release, tmp_path, rank):
    run = expert_run(tmp_path, "news", release, rank=rank)
    package, public = load_package(loop.train(run)), load_package(release / "public")
    expert = whole_expert("news", package, public)
    matrices = [name for name in expert if name.startswith("w_")]
    apart = sum(((expert[name] - public[name]) ** 2).sum() for name in matrices)
    whole = sum((public[name] ** 2).sum() for name in matrices)
    assert lines_of(run)[-1]["distance"] == pytest.approx(math.sqrt(apart / whole), rel=1e-5)


def test_router_accuracy_is_of_own_and_public_tokens_alike():
    """Rows of the owner with odds above 0 in two of three tokens, of public text below 0 in one of one."""
    from flexmoe_jax.data.pipeline import Batch
    from flexmoe_jax.training.step import _by_source

    own = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    weights = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    odds = jnp.array([2.0, 1.0, -1.0, -3.0, 9.0, 9.0])
    logits = jnp.stack([jnp.zeros(6), odds], axis=-1)[None]
    batch = Batch(own, own, own, weights, own)
    totals = {"all": weights.sum(), "own": (weights * own).sum()}
    nll = jnp.array([[1.0, 2.0, 3.0], [5.0, 7.0, 7.0]])
    found = jax.tree.map(np.asarray, _by_source(nll, logits, batch, totals))
    np.testing.assert_allclose(found["router_accuracy"], [(2 / 3 + 1) / 2], rtol=1e-6)
    np.testing.assert_allclose([found["own_loss"], found["public_loss"]], [2.0, 5.0], rtol=1e-6)


def test_held_out_documents_are_never_trained_on_and_are_those_that_are_scored(release, tmp_path):
    run = expert_run(tmp_path, "news", release, holdout=0.25, eval_every=3)
    kept = [document.text for document in read_documents(run.data) if held_out(document, 0.25)]
    assert 5 <= len(kept) <= 25  # of 60: five standard deviations around 15
    seen: list[str] = []
    write = loop.write_store

    def noted(documents, *args, **kwargs):
        documents = list(documents)
        seen.extend(document.text for document in documents)
        return write(documents, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_store", noted)
        loop.train(run)
    assert sorted(seen + kept) == sorted(document.text for document in read_documents(run.data))
    assert not set(seen) & set(kept)
    assert loop.Validation(run, None, None).texts == {"own": kept}
    assert lines_of(run)[-1]["validation"]["own"] > 0
    with pytest.raises(Exception, match=r"config\.holdout: 0\.25 != 0\.5"):
        loop.train(dataclasses.replace(run, holdout=0.5))


@pytest.mark.parametrize(
    "name", ["validation/part.jsonl", "test/a/part.jsonl", "dev/train/test/0.jsonl", "heldout.jsonl"]
)
def test_text_in_files_and_folders_named_for_it_is_scored_and_no_other_file_is_opened(tmp_path, monkeypatch, name):
    named, opened = tmp_path / name, []
    named.parent.mkdir(parents=True, exist_ok=True)
    write_documents(tmp_path, "news", split="large")
    named.write_text('{"text": "held out"}\n', encoding="utf-8")

    def noted(file, *args, records=sources.records):
        opened.append(file)
        return records(file, *args)

    monkeypatch.setattr(sources, "records", noted)
    assert validation._heldout(None, [tmp_path], Fields(), 1000) == ["held out"]
    assert opened == [named]


def test_documents_of_one_group_are_held_out_together():
    (document,) = itertools.islice(_documents(), 1)
    others = [dataclasses.replace(document, text=str(i), id=str(i)) for i in range(50)]
    for share in (0.0, 0.3, 0.9):
        assert {held_out(other, share) for other in others} == {held_out(document, share)}
    assert not held_out(document, 0.0)


def _documents():
    from flexmoe_jax.data.sources import Document

    yield Document("text", "", "", "group", "train", "id", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish": "best"}, "publish is 'best', and no held-out text"),
        ({"patience": 2}, "patience is 2, and no held-out text"),
        ({"publish": "best", "holdout": 0.2, "eval_every": None}, r"config\.eval_every is None"),
        ({"holdout": 1e-9}, "no document of .* falls in that share"),
    ],
)
def test_a_run_that_needs_held_out_text_is_refused_without(release, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message) as refusal:
        loop.train(expert_run(tmp_path, "news", release, **changes))
    assert refusal.value.remedy


def test_without_held_out_text_the_log_says_that_nothing_is_validated(release, tmp_path, caplog):
    caplog.set_level("INFO", "flexmoe_jax")
    loop.train(expert_run(tmp_path, "news", release))
    assert any("nothing is validated" in line and "config.validation" in line for line in caplog.messages)


def test_a_spike_is_said_and_counted(caplog):
    window = Window()
    losses = 3 + 0.1 * np.random.default_rng(0).standard_normal(SPIKE_LEAST)
    assert [window.add({"loss": loss}) for loss in losses] == [None] * SPIKE_LEAST
    above = window.add({"loss": 9.0})
    assert above == pytest.approx((9 - losses.mean()) / losses.std())
    assert window.spikes == 1
    again = Window(json.loads(json.dumps(window.state)))  # as a checkpoint keeps it
    assert again.state == window.state
    assert Window().add({"loss": 9.0}) is None  # nothing to hold it against
