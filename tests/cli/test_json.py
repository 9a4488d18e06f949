"""With --json stdout holds one JSON object and nothing else; what is for people goes to stderr."""

import json
import math
import pathlib
import shutil

import pytest

from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.cli.common import emit
from flexmoe_jax.cli.main import main
from flexmoe_jax.evaluate.tasks import Result

EXPERIMENT = """
from flexmoe_jax.experiment import run_config
def get_config(arg):
    return run_config(owner=arg, steps=2, batch_size=2, seq_len=16, log_every=1)
"""


def run(capsys, *argv) -> dict:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def experiment(tmp_path) -> pathlib.Path:
    """An experiment file that leaves all paths to the command line."""
    (tmp_path / "run.py").write_text(EXPERIMENT)
    return tmp_path / "run.py"


def test_train_prints_the_package(world, experiment, tmp_path, capsys):
    paths = {"data": world / "news" / "data", "public": world / "public" / "run" / "model", "out": tmp_path / "run"}
    paths["domain_vector"] = world / "news" / "domain.json"
    overrides = [f"--config.{key}={path}" for key, path in paths.items()]
    result = run(capsys, "train", f"--config={experiment}:news", *overrides)
    manifest = read_manifest(tmp_path / "run" / "package")
    assert result["path"] == str(tmp_path / "run" / "package")
    assert (result["owner"], result["digest"], result["content"]) == ("news", manifest.digest, manifest.content)


def test_pretrain_prints_the_model(world, experiment, tmp_path, capsys):
    paths = {"data": world / "public" / "data", "public": world / "model", "out": tmp_path / "run"}
    overrides = [f"--config.{key}={path}" for key, path in paths.items()]
    result = run(capsys, "pretrain", f"--config={experiment}:public", *overrides)
    assert (result["path"], result["experts"]) == (str(tmp_path / "run" / "model"), ["public", "code", "news"])
    assert result == run(capsys, "inspect", tmp_path / "run" / "model")


def test_keygen_and_sign_print_what_was_written(world, tmp_path, capsys):
    key = run(capsys, "keygen", tmp_path / "news.key", "--owner", "news")
    assert key["trusted"] == pathlib.Path(key["public"]).read_text(encoding="utf-8").strip()
    assert key["trusted"].startswith("news ")
    package = shutil.copytree(world / "news" / "run" / "package", tmp_path / "package")
    signed = run(capsys, "sign", package, "--key", key["private"], "--version", 3)
    assert signed == {"path": str(package), "version": 3}
    (tmp_path / "trusted").write_text(key["trusted"] + "\n")
    assert run(capsys, "verify", package, "--trusted", tmp_path / "trusted", "--require-signature")["ok"]


def test_generate_prints_the_prompt_and_its_continuation(world, capsys):
    asked = ("generate", world / "model", "--prompt", "the king", "--max-new-tokens", "4")
    result = run(capsys, *asked)
    assert result["prompt"] == "the king"
    assert main(list(map(str, asked))) == 0
    assert capsys.readouterr().out == f"the king{result['continuation']}\n"


@pytest.mark.torch
def test_what_owners_compute_of_their_documents(world, tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    own, public = world / "news" / "data", world / "public" / "data"
    vector = run(capsys, "embed", own, "--out", tmp_path / "domain.json", "--count", "20")
    assert (vector["count"], vector["seen"]) == (20, 60)
    assert vector["width"] == len(json.loads((tmp_path / "domain.json").read_text())["vector"])
    given = ("--public-data", public, "--out", tmp_path / "news.json", "--count", "40")
    classifier = run(capsys, "train-classifier", own, *given)
    assert classifier["accuracy"] > 0.9
    given = ("--classifier", f"news={tmp_path / 'news.json'}", "--out", tmp_path / "proxies", "--count", "5")
    [proxies] = run(capsys, "find-proxies", public, *given)["proxies"]
    assert (proxies["owner"], proxies["path"]) == ("news", str(tmp_path / "proxies" / "news"))
    assert proxies["log_odds"]["highest"] >= proxies["log_odds"]["lowest"]


def test_numbers_that_json_does_not_have_are_null(capsys):
    result = {"error": math.nan, "tasks": [Result("t", "accuracy", 0.5, math.nan, 1), -math.inf], "a": "NaN"}
    emit(result, [], True)
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    task = {"task": "t", "metric": "accuracy", "score": 0.5, "error": None, "examples": 1}
    assert printed == {"error": None, "tasks": [task, None], "a": "NaN"}
