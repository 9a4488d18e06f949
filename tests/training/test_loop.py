"""Whole runs: their files, exact resumption, and refused input."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flexmoe_jax.artifacts.checkpoints import verify_run
from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import load_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.training import loop
from flexmoe_jax.training.metrics import OF_TIME, MetricsFile
from flexmoe_jax.tree import PUBLIC, TRUNK
from tests.tiny import expert_run, public_run, write_documents, write_vector


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    """A trained public release, shared by the module; tests must not change it."""
    return loop.train(public_run(tmp_path_factory.mktemp("world")))


def metrics_of(run) -> list[dict]:
    lines = [json.loads(line) for line in (pathlib.Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]


def test_a_public_run_writes_a_release_whose_router_row_is_the_domain_embedding(release):
    model = open_model(release)
    assert model.experts == (PUBLIC,)
    public = load_package(release / PUBLIC)
    np.testing.assert_allclose(np.linalg.norm(public["router"], axis=1), 0.1, rtol=1e-6)  # config.router_scale
    assert (public["bias"] == 0).all()


def test_an_expert_run_writes_a_package_bound_to_the_release_and_does_not_change_the_release(release, tmp_path):
    before = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    run = expert_run(tmp_path, "news", release)
    package = loop.train(run)
    manifest, public = read_manifest(package, "news"), open_model(release)
    assert manifest.base == {
        TRUNK: public.manifests[TRUNK].content,
        PUBLIC: public.manifests[PUBLIC].content,
        "tokenizer": public.tokenizer_digest,
    }
    assert before == {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    expert, initial = load_package(package), load_package(release / PUBLIC)
    assert all((expert[leaf] != initial[leaf]).any() for leaf in expert)
    assert manifest.record.training["tokens"] == 6 * 4 * 32
    assert merge(release, [package], tmp_path / "model").experts == (PUBLIC, "news")
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(6))
    for line in lines:
        assert set(line["share"]) == {PUBLIC, "news"}
        assert sum(line["share"].values()) == pytest.approx(1, abs=1e-5)


def test_a_public_model_of_another_shape_than_expected_is_refused(release, tmp_path):
    shape = open_model(release).config
    run = expert_run(tmp_path, "news", release, model=dataclasses.replace(shape, d_ff=8))
    with pytest.raises(FlexMoEError, match=f"not the shape of the model .*\n.*d_ff: 8 != {shape.d_ff}"):
        loop.train(run)


FACTORED = OptimizerConfig(lr=1e-2, warmup_steps=1, first_moment="bfloat16", second_moment="factored")


@pytest.mark.parametrize(
    ("public_fraction", "optimizer", "number", "code"),
    [
        (0.0, None, signal.SIGTERM, 75),
        (0.5, None, signal.SIGINT, 130),
        (0.0, FACTORED, signal.SIGHUP, 75),
        (0.0, None, signal.SIGUSR1, 75),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    release, tmp_path, monkeypatch, public_fraction, optimizer, number, code, caplog
):
    """A signal after step 3: the run saves, and the resumed run gives the same bits and metrics as without a stop."""
    mixed = {"public_fraction": public_fraction} | ({"optimizer": optimizer} if optimizer else {})
    if public_fraction:
        mixed["public_data"] = str(write_documents(tmp_path / "sample", "public"))
    whole = expert_run(tmp_path / "a", "news", release, **mixed)
    halved = expert_run(tmp_path / "b", "news", release, **mixed)
    expected = read_manifest(loop.train(whole)).content

    make = loop.make_train_step

    def stopping(*args):
        step, calls = make(*args), iter(range(100))

        def counted(*inputs):
            if next(calls) == 2:
                os.kill(os.getpid(), number)
            return step(*inputs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", stopping)
        with pytest.raises(loop.Stopped, match=f"stopped by {number.name} after step 3 of 6") as stopped:
            loop.train(halved)
    assert stopped.value.exit_code == code
    assert not (pathlib.Path(halved.out) / "package").exists()
    caplog.set_level("INFO", "flexmoe_jax")
    assert read_manifest(loop.train(halved)).content == expected
    assert "resumed at step 3" in caplog.messages
    assert metrics_of(halved) == metrics_of(whole)


_RUN_IN_A_PROCESS = """
import json, sys
from flexmoe_jax.cli.main import use_compilation_cache
use_compilation_cache()
from flexmoe_jax.config import RunConfig
from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.training.loop import train
train(from_mapping(RunConfig, json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_killed_without_warning_and_resumed_equals_uninterrupted(release, tmp_path, delay_s, caplog):
    """SIGKILL some time after step 6 is saved: no saved step is lost, and at most two intervals are repeated (the last
    one, and the one whose save was running)."""
    steps, every = 60, 3
    killed = expert_run(tmp_path / "a", "news", release, steps=steps, save_every=every)
    whole = expert_run(tmp_path / "b", "news", release, steps=steps, save_every=steps)
    out = pathlib.Path(killed.out)
    process = subprocess.Popen([sys.executable, "-c", _RUN_IN_A_PROCESS, json.dumps(dataclasses.asdict(killed))])
    while not (out / "digests" / "6.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay_s)
    saved = max(int(path.stem) for path in (out / "digests").glob("*.json"))
    process.kill()
    process.wait()
    assert not (out / "package").exists()  # killed in the middle, not after the end
    recorded = (out / "metrics.jsonl").read_text().count("\n")
    caplog.set_level("INFO", "flexmoe_jax")
    package = loop.train(killed)
    resumed = next(int(line.split()[-1]) for line in caplog.messages if line.startswith("resumed at step "))
    assert resumed >= saved
    assert recorded - resumed <= 2 * every
    assert read_manifest(package).content == read_manifest(loop.train(whole)).content


def test_a_finished_run_is_not_changed(release, tmp_path, caplog):
    run = expert_run(tmp_path, "news", release)
    loop.train(run)
    before = {p: p.stat().st_mtime_ns for p in pathlib.Path(run.out, "package").rglob("*")}
    caplog.set_level("INFO", "flexmoe_jax")
    loop.train(run)
    assert any("nothing to do" in line for line in caplog.messages)
    assert before == {p: p.stat().st_mtime_ns for p in pathlib.Path(run.out, "package").rglob("*")}


def test_another_configuration_or_other_data_is_refused_with_the_difference(release, tmp_path):
    run = expert_run(tmp_path, "news", release)
    loop.train(run)
    with pytest.raises(FlexMoEError, match=r"config\.seed: 0 != 1"):
        loop.train(dataclasses.replace(run, seed=1))
    write_documents(pathlib.Path(run.data), "code")
    with pytest.raises(FlexMoEError, match=r"data\.own\.documents: .* != "):
        loop.train(run)


def test_a_run_resumes_with_a_difference_that_is_allowed_by_name(release, tmp_path, caplog):
    run = expert_run(tmp_path, "news", release, steps=4)
    loop.train(run)
    shutil.rmtree(pathlib.Path(run.out) / "package")
    longer = dataclasses.replace(run, steps=6, seed=1)
    with pytest.raises(FlexMoEError, match=r"--allow=config\.step is not a key .*\n.*did you mean 'config\.steps'"):
        loop.train(longer, allow=["config.step"])
    with pytest.raises(FlexMoEError, match=r"config\.seed: 0 != 1") as error:
        loop.train(longer, allow=["config.steps"])
    assert "config.steps" not in str(error.value)
    caplog.set_level("INFO", "flexmoe_jax")
    package = loop.train(dataclasses.replace(run, steps=6), allow=["config.steps"])
    assert "changed as allowed: config.steps: 4 != 6" in caplog.messages
    assert "resumed at step 4" in caplog.messages
    assert read_manifest(package).record.training["steps"] == 6
    loop.train(dataclasses.replace(run, steps=6))  # run.json has the new value


def make_bad(monkeypatch, *numbers: int) -> None:
    """The batches of these numbers, counted from the start of the process, give a loss that is not finite."""
    place, calls = loop.place_batch, iter(range(1000))

    def placed(mesh, batch):
        if next(calls) in numbers:
            batch = dataclasses.replace(batch, weights=batch.weights * np.float32(np.nan))
        return place(mesh, batch)

    monkeypatch.setattr(loop, "place_batch", placed)


def test_every_skipped_step_is_said_and_too_many_publish_nothing(release, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", "flexmoe_jax")
    run = expert_run(tmp_path, "news", release, steps=99, save_every=99, log_every=99)
    with monkeypatch.context() as patch:
        make_bad(patch, 7)
        with pytest.raises(DataError, match="1 of 99 steps were skipped") as refusal:
            loop.train(run)
    said = "step 7 is skipped: its loss is not finite (windows 28 to 31 of the data in the order of seed 0)"
    assert [line for line in caplog.messages if "is skipped" in line] == [said]
    assert ", 1 skipped" in capsys.readouterr().err  # the progress line
    assert not pathlib.Path(run.out, "package").exists()
    with pytest.raises(DataError, match="1 of 99"):  # the same command again does not publish it either
        loop.train(run)
    assert verify_run(run.out)  # its checkpoints stay
    assert "train on with more config.steps and --allow=config.steps" in refusal.value.remedy
    package = loop.train(dataclasses.replace(run, steps=100), allow=["config.steps"])
    assert read_manifest(package).record.training["skipped_steps"] == 1


def test_a_run_that_stopped_for_bad_steps_goes_on_with_a_lower_learning_rate_as_its_remedy_says(
    release, tmp_path, monkeypatch
):
    run = expert_run(tmp_path, "news", release, max_bad_steps=2)
    with monkeypatch.context() as patch:
        make_bad(patch, 2, 3)
        with pytest.raises(FlexMoEError, match="not finite for 2 steps") as refusal:
            loop.train(run)
    assert "lower config.optimizer.lr with --allow=config.optimizer.lr" in refusal.value.remedy
    lower = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=1e-3))
    with pytest.raises(FlexMoEError, match=r"optimizer\.lr: 0.01 != 0.001"):
        loop.train(lower)
    package = loop.train(lower, allow=["config.optimizer.lr"])
    assert read_manifest(package).record.training["skipped_steps"] == 0


def test_a_start_that_failed_before_its_first_checkpoint_binds_nothing(release, tmp_path, monkeypatch):
    """The corrected start has other steps, another seed and other documents; it equals a run in a fresh folder."""
    wrong = expert_run(tmp_path, "news", release, max_bad_steps=1, seed=3)
    with monkeypatch.context() as patch:
        make_bad(patch, 0)
        with pytest.raises(FlexMoEError, match="not finite"):
            loop.train(wrong)
    assert json.loads(pathlib.Path(wrong.out, "run.json").read_text(encoding="utf-8"))["config"]["seed"] == 3
    write_documents(pathlib.Path(wrong.data), "code")
    right = dataclasses.replace(wrong, seed=1, steps=4)
    fresh = dataclasses.replace(right, out=str(tmp_path / "fresh"))
    assert read_manifest(loop.train(right)).content == read_manifest(loop.train(fresh)).content
    assert pathlib.Path(right.out, "run.json").read_bytes() == pathlib.Path(fresh.out, "run.json").read_bytes()


def test_tokens_of_a_failed_start_are_used_again_where_the_documents_are_the_same(release, tmp_path, monkeypatch):
    run = expert_run(tmp_path, "news", release, max_bad_steps=1)
    with monkeypatch.context() as patch:
        make_bad(patch, 0)
        with pytest.raises(FlexMoEError, match="not finite"):
            loop.train(run)
    before = (pathlib.Path(run.out) / "tokens").stat().st_ino
    loop.train(dataclasses.replace(run, steps=4))
    assert (pathlib.Path(run.out) / "tokens").stat().st_ino == before


@pytest.mark.parametrize("kind", ["holdout", "documents", "tokenizer"])
def test_no_order_of_failed_starts_leaves_tokens_of_another_start(tmp_path, monkeypatch, kind):
    """A start fails in its first step, another one before it writes run.json; the third is like the first."""
    run = public_run(tmp_path, holdout=0.3, steps=1)
    other = dataclasses.replace(
        run, **{"holdout": {"holdout": 0.0}, "tokenizer": {"tokenizer": "cl100k:400"}}.get(kind, {})
    )
    fresh = dataclasses.replace(run, out=str(tmp_path / "fresh"))
    loop.train(fresh)
    for which, function in ((run, "_fit"), (other, "identity_of")):
        if kind == "documents":
            write_documents(pathlib.Path(run.data), "public" if which is run else "code")
        with monkeypatch.context() as patch:
            patch.setattr(loop, function, lambda *_: (_ for _ in ()).throw(RuntimeError("a failed start")))
            with pytest.raises(RuntimeError, match="a failed start"):
                loop.train(which)
    write_documents(pathlib.Path(run.data), "public")
    loop.train(run)
    assert pathlib.Path(run.out, "run.json").read_bytes() == pathlib.Path(fresh.out, "run.json").read_bytes()


def test_a_run_trains_in_a_thread_that_is_not_the_main_one(release, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        package = threads.submit(loop.train, expert_run(tmp_path, "news", release)).result()
    assert read_manifest(package).owner == "news"


def test_metrics_that_cannot_be_written_are_an_error_with_a_remedy(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics._file = open("/dev/full", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        with pytest.raises(ArtifactError, match="/dev/full cannot be written: No space left") as refusal:
            metrics.write({"step": 1})
    assert "resumes at the last saved step" in refusal.value.remedy


def test_metrics_of_a_resumed_run_are_rewritten_atomically(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in range(4)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "share": {"news": 1}')

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            MetricsFile(path, 3)
    assert path.read_text().splitlines()[:4] == lines
    with MetricsFile(path, 3):
        pass
    assert path.read_text().splitlines() == lines[:3]


def test_a_run_that_diverges_stops_with_the_step_in_the_message(release, tmp_path):
    hot = OptimizerConfig(lr=1e30, warmup_steps=0, clip_norm=1e30)
    run = expert_run(tmp_path, "news", release, optimizer=hot, max_bad_steps=2, steps=50)
    with pytest.raises(FlexMoEError, match="not finite for 2 steps in a row"):
        loop.train(run)
    assert not (pathlib.Path(run.out) / "package").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain_vector": "nowhere.json"}, "nowhere.json does not exist"),
        ({"seq_len": 64}, "64.*32"),
        ({"data": "nowhere"}, "config.data 'nowhere' does not exist"),
        ({"owner": "trunk"}, "reserved"),
        ({"owner": "No Name"}, "not usable"),
        ({"public": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(release, tmp_path, change, message):
    with pytest.raises(FlexMoEError, match=message) as error:
        loop.train(dataclasses.replace(expert_run(tmp_path, "news", release), **change))
    assert error.value.remedy


def test_a_vector_of_another_encoder_is_refused(release, tmp_path):
    run = expert_run(tmp_path, "news", release)
    write_vector(pathlib.Path(run.domain_vector), 3, encoder_digest="f" * 64)
    with pytest.raises(FlexMoEError, match=r"ffffffffffff.*eeeeeeeeeeee"):
        loop.train(run)


def test_tokens_of_another_tokenizer_are_refused(release, tmp_path):
    run = expert_run(tmp_path, "news", release)
    texts = [document.text for document in read_documents(run.data)]
    write_store(iter(texts), load_tokenizer("cl100k:400"), tmp_path / "other")
    with pytest.raises(FlexMoEError, match="tokenizer"):
        loop.train(dataclasses.replace(run, data=str(tmp_path / "other")))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(FlexMoEError, match=r"600.*512"):
        loop.train(public_run(tmp_path, tokenizer="cl100k:600"))


def test_a_public_run_from_an_existing_model_trains_all_its_experts(release, tmp_path):
    packages = [loop.train(expert_run(tmp_path, owner, release)) for owner in ("news", "code")]
    merged = merge(release, packages, tmp_path / "merged").path
    run = public_run(tmp_path, model=None, public=str(merged), domain_vector=None, top_k=2, steps=2)
    before, after = open_model(merged), open_model(loop.train(run))
    assert after.experts == before.experts == (PUBLIC, "code", "news")
    assert after.top_k == 2
    assert after.config == before.config
    for name in (TRUNK, *after.experts):
        assert after.manifests[name].content != before.manifests[name].content
    assert after.manifests["news"].base[TRUNK] == after.manifests[TRUNK].content


def test_an_expert_trained_without_the_public_one_merges_like_any_other(release, tmp_path):
    package = loop.train(expert_run(tmp_path, "news", release, coordinate=False, router_z_loss=0.0))
    coordinated = loop.train(expert_run(tmp_path / "other", "news", release))
    assert (load_package(package)["w_up"] != load_package(coordinated)["w_up"]).any()
    assert merge(release, [package], tmp_path / "merged").experts == (PUBLIC, "news")
