"""Several sources with weights: how they are written, what a run makes of them, and what it says."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest

from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.cli.common import check_paths
from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ArtifactError, ConfigError, DataError
from flexmoe_jax.source_config import Source, read_mixture
from flexmoe_jax.training import loop
from flexmoe_jax.training.validation import Validation
from tests.tiny import expert_run, public_run, write_documents

OWNER = {"owner": "news", "out": "o", "steps": 3, "batch_size": 4, "seq_len": 8, "public": "p", "domain_vector": "v"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("letters", {"letters": ("letters", 1)}),
        ("3 letters", {"3 letters": ("3 letters", 1)}),  # a path
        ("a; b", {"a; b": ("a; b", 1)}),  # a path
        ("3 x/letters; 1 minutes", {"letters": ("x/letters", 3), "minutes": ("minutes", 1)}),
        ("0.6 web;0.3 code; 1e-1 math;", {"web": ("web", 6), "code": ("code", 3), "math": ("math", 1)}),
        ("2 a/data; 4 b/data; 2 c d/data", {"data": ("a/data", 1), "data-2": ("b/data", 2), "data-3": ("c d/data", 1)}),
    ],
)
def test_a_mixture_is_weights_and_paths(text, expected):
    assert read_mixture("config.data", text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3 a; 0 b", "gives b the weight 0"),
        ("-1 a; 2 b", "gives a the weight -1"),
        ("3 a; 1.2.3 b", "gives b the weight 1.2.3"),
        ("3 a; 1 x/../a", "names x/../a twice"),
        ("3 a; b", "holds 'b'"),
        ("1 a; 0.3333333 b", "13,333,333 rows only"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(ConfigError) as refusal:
        RunConfig(data=text, **OWNER)
    assert words in refusal.value.what
    assert refusal.value.remedy


def test_the_order_in_which_sources_are_written_does_not_matter():
    """Batches depend on the order of the sources, and a resumed run may write them in another one."""
    for text in ("3 x/b; 1 a; 2 c", "2 c; 3 x/b; 1 a"):
        assert list(read_mixture("config.data", text).items()) == [("a", ("a", 1)), ("b", ("x/b", 3)), ("c", ("c", 2))]


def test_sources_are_named_by_side_and_folder():
    run = RunConfig(data="3 letters; 1 minutes", public_data="pub", public_fraction=0.5, **OWNER)
    assert run.sources == {
        "own.letters": Source("data", "letters", 3),
        "own.minutes": Source("data", "minutes", 1),
        "public": Source("public_data", "pub", 1),
    }


def test_every_path_of_a_mixture_is_checked(tmp_path):
    (tmp_path / "here").mkdir()
    run = RunConfig(data=f"3 {tmp_path}/here; 1 {tmp_path}/gone", **OWNER | {"public": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"gone does not exist") as refusal:
        check_paths(run)
    assert "config.data: The owner's training data" in refusal.value.remedy


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> pathlib.Path:
    """A trained public release, shared by the module; tests must not change it."""
    return loop.train(public_run(tmp_path_factory.mktemp("world"), steps=1))


def mixed_run(root: pathlib.Path, release: pathlib.Path, **changes) -> RunConfig:
    """Two own sources, 3 to 1, and two public ones, 1 to 1; the second own one is small."""
    letters, minutes = write_documents(root / "letters", "news"), write_documents(root / "minutes", "code", count=2)
    web, math = write_documents(root / "web", "public"), write_documents(root / "math", "math")
    run = expert_run(root, "news", release, data=f"3 {letters}; 1 {minutes}")
    mixed = {"public_data": f"1 {web}; 1 {math}", "public_fraction": 0.25, "router_contrast": 0.1}
    return dataclasses.replace(run, **mixed | changes)


def test_a_mixed_run_binds_every_source_tells_its_epochs_and_resumes_exactly(release, tmp_path, caplog):
    caplog.set_level("INFO", "flexmoe_jax")
    whole = mixed_run(tmp_path / "a", release, steps=30, save_every=30, log_every=30)
    expected = read_manifest(loop.train(whole)).content
    data = json.loads(pathlib.Path(whole.out, "run.json").read_text(encoding="utf-8"))["data"]
    assert {side: {name: source["weight"] for name, source in data[side].items()} for side in data} == {
        "own": {"letters": 3, "minutes": 1},
        "public": {"web": 1, "math": 1},
    }
    digests = [source[kind] for side in data.values() for source in side.values() for kind in ("tokens", "documents")]
    assert len(set(digests)) == 8
    said = [line for line in caplog.messages if line.startswith("source ")]
    assert [line.split()[1].strip(":") for line in said] == [
        "own.letters",
        "own.minutes",
        "own.minutes",
        "public.math",
        "public.web",
    ]
    assert "56.2% of the rows" in said[0]  # three quarters of three quarters
    assert "over 4 times, repeated text teaches little" in said[2]

    lines = (pathlib.Path(whole.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seen = [json.loads(line) for line in lines if "seen" in line][-1]["seen"]
    rows = {"own.letters": 2.25, "own.minutes": 0.75, "public.web": 0.5, "public.math": 0.5}  # of a step
    assert set(seen) == set(rows)
    assert all(abs(source["tokens"] / 32 - 30 * rows[name]) < 1 for name, source in seen.items())
    assert seen["own.minutes"]["epochs"] > 4

    halved = mixed_run(tmp_path / "b", release, steps=11, save_every=30, log_every=30)
    halved = dataclasses.replace(halved, optimizer=dataclasses.replace(halved.optimizer, schedule_steps=30))
    shutil.rmtree(loop.train(halved))
    halved = dataclasses.replace(halved, steps=30)
    assert read_manifest(loop.train(halved, allow=["config.steps"])).content == expected


def test_a_failed_start_of_one_source_is_followed_by_a_mixture_of_any_names(release, tmp_path, monkeypatch):
    """`run.json` of the failed start has `documents` and `tokens` where that of the mixture has its sources."""
    one = expert_run(tmp_path, "news", release, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_fit", lambda *_: (_ for _ in ()).throw(RuntimeError("a failed start")))
        with pytest.raises(RuntimeError, match="a failed start"):
            loop.train(one)
    folders = [write_documents(tmp_path / name, "code") for name in ("documents", "tokens")]
    mixed = dataclasses.replace(one, data="; ".join(f"1 {folder}" for folder in folders))
    assert loop.train(mixed).exists()


def test_held_out_text_comes_from_every_source(release, tmp_path):
    run = mixed_run(tmp_path, release)
    for name, domain in (("letters", "news"), ("minutes", "code"), ("math", "math")):
        write_documents(tmp_path / name, domain, count=6, split="heldout")
    nothing: Any = None  # texts need no model
    texts = {side: " ".join(found) for side, found in Validation(run, nothing, nothing).texts.items()}
    assert {word in texts["own"] for word in ("minister", "lambda")} == {True}
    assert "prime" in texts["public"]
    assert "minister" not in texts["public"]
    held = dataclasses.replace(run, holdout=0.9, eval_bytes=2000)
    assert {word in " ".join(Validation(held, nothing, nothing).texts["own"]) for word in ("minister", "lambda")} == {
        True
    }


def test_other_weights_and_another_source_are_refused_by_name(release, tmp_path):
    run = mixed_run(tmp_path, release, steps=2)
    loop.train(run)
    with pytest.raises(ArtifactError, match=r"data\.own\.letters\.weight: 3 != 2"):
        loop.train(dataclasses.replace(run, data=run.data.replace("3 ", "2 ")))
    write_documents(tmp_path / "web", "code")
    with pytest.raises(ArtifactError, match=r"data\.public\.web\.documents: "):
        loop.train(run)


def test_a_source_that_is_missing_or_fills_no_window_is_refused_by_name(release, tmp_path):
    run = mixed_run(tmp_path, release)
    with pytest.raises(DataError, match=r"config\.data 'nowhere' does not exist"):
        loop.train(dataclasses.replace(run, data=f"{run.data}; 1 nowhere"))
    (tmp_path / "minutes" / "train.jsonl").write_text('{"text": "short"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"the source 'own\.minutes': .* too few for one window of 32"):
        loop.train(run)
