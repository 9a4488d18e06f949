"""No command that runs on a hostile model directory changes anything outside it."""

import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.compose.verify import verify
from flexmoe_jax.errors import FlexMoEError
from tests.artifacts.model_attacks import (
    CERTIFICATES,
    Attack,
    attacks,
    deep,
    journal_names,
    like_a_run,
    link,
    resolved,
    staged_beside,
)
from tests.tiny import contents


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """The folder of a user who received `model` and `release`, with files of their own beside them."""
    root = tmp_path_factory.mktemp("home")
    shutil.copytree(world / "public" / "run" / "model", root / "release")
    for name in ("code", "news"):
        shutil.copytree(world / name / "run" / "package", root / name)
    manifest, params = read_manifest(root / "code"), load_package(root / "code")
    params["bias"] = params["bias"] - 1
    write_package(root / "code2", owner="code", params=params, config=manifest.config, base=manifest.base, record={})
    shutil.copy(world / "news" / "domain.json", root / "domain.json")
    merge(root / "release", [root / "code", root / "news"], root / "model")
    merge(root / "release", [root / "code", root / "news"], root / "before")
    opt_out(root / "before", "news", root / "other", certificate=root / "proof.json")
    shutil.rmtree(root / "before")
    shutil.rmtree(root / "other")
    assert main(["keygen", str(root / "key"), "--owner", "public"]) == 0
    shutil.copytree(world / "news" / "data", root / "victim")
    shutil.copytree(root / "news", root / "victim" / "package")
    shutil.copytree(world / "news" / "data", root / "proxies" / "news")
    (root / "victim.txt").write_text("mine")
    return root


# Every command that takes a model directory, as typed in the folder that holds the directory.
VERBS = {
    "optout": ["optout", "model", "--expert", "news"],
    "optout code": ["optout", "model", "--expert", "code"],
    "optout, certificate": ["optout", "model", "--expert", "news", "--certificate", "out/proof.json"],
    "optout --out": ["optout", "model", "--expert", "news", "--out", "out/model"],
    "replace": ["replace", "model", "--package", "code2"],
    "sign": ["sign", "release", "--key", "key", "--version", "1"],
    "sign model": ["sign", "model", "--key", "key", "--version", "1"],
    "sign package": ["sign", "model/news", "--key", "key", "--version", "1"],
    "verify": ["verify", "model"],
    "verify --quick": ["verify", "model", "--quick"],
    "verify, certificate": ["verify", "model", "--certificate", "proof.json"],
    "inspect": ["inspect", "model"],
    "inspect --journal": ["inspect", "model", "--journal"],
    "merge": ["merge", "--public", "release", "--package", "news", "--out", "out/model"],
    "merge --link": ["merge", "--public", "release", "--package", "news", "--out", "out/model", "--link"],
    "export-hf": ["export-hf", "model", "--out", "out/hf", "--no-logits", "--custom-code"],
    "generate": ["generate", "model", "--prompt", "a", "--max-new-tokens", "1"],
    "eval": ["eval", "model", "--data", "victim", "--seq-len", "8"],
    "eval-joining": [
        "eval-joining",
        "model",
        "--heldout",
        "news=victim",
        "--seq-len",
        "8",
        "--report",
        "out/joining.json",
    ],
    "tune": ["tune", "model", "--proxies", "proxies", "--public-data", "victim", "--out", "out/tuned", "--steps", "1"],
    "train": ["train", "--config=run.py"],
}
SLOW = ("export-hf", "generate", "eval", "eval-joining", "tune", "train")
QUICK = [verb for verb in VERBS if verb not in SLOW]


def state(folder: pathlib.Path, leave_out: tuple[pathlib.Path, ...]) -> dict[str, object]:
    """Everything under `folder`: bytes and modes of files, targets of links, names of directories."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if pathlib.Path(parent, name) not in leave_out]
        for name in (*folders, *files):
            path = pathlib.Path(parent, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = (path.stat().st_mode, path.read_bytes() if path.is_file() else None)
    return found


def delete(folder: pathlib.Path) -> None:
    """Deletes a directory of any depth, without the code that is tested."""
    subprocess.run(["rm", "-rf", folder], check=True)


def run_verb(verb: str) -> int:
    try:
        return main(VERBS[verb])
    except SystemExit as error:  # argparse
        return int(error.code or 0)


def strike(home: pathlib.Path, attacks: list[Attack], verb: str) -> str:
    """Runs the command in the folder of the attacked directory, asserts that nothing else changed: refused or done."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "home"
        shutil.copytree(home, root, symlinks=True)
        (root / "run.py").write_text(RUN)
        (root / "out").mkdir()
        attacked = "release" if "release" in VERBS[verb] else "model"
        for attack in attacks:
            attack(root / attacked)
        own = (root / attacked, root / "out")
        before = state(root, own)
        there = os.getcwd()
        os.chdir(root)
        try:
            code = run_verb(verb)
        finally:
            os.chdir(there)
        try:
            assert code in (0, 1, 2), code
            assert state(root, own) == before
            made = {"model", "proof.json", "hf", "tuned", "run", ".proof.json.pending", "joining.json"}
            assert {p.name for p in (root / "out").glob("*")} <= made
        finally:
            delete(root / attacked)  # `tempfile` fails at a deep one
        return "refused" if code else "done"


RUN = """
from flexmoe_jax.experiment import run_config

def get_config(arg):
    return run_config(owner="law", public="model", data="victim", domain_vector="domain.json", out="out/run", steps=1,
                      batch_size=1, seq_len=8)
"""


@settings(max_examples=120)
@given(attacks=attacks, verb=st.sampled_from(QUICK))
@example(attacks=[resolved(journal_names, "ABSOLUTE")], verb="optout code")
@example(attacks=[resolved(journal_names, "../victim")], verb="replace")
@example(attacks=[link(".model.json.partial")], verb="optout")
@example(attacks=[link(".journal.jsonl.partial")], verb="replace")
@example(attacks=[link("trunk", "SELF")], verb="sign")
@example(attacks=[link("public/.signature.json.partial")], verb="sign")
@example(attacks=[staged_beside("code")], verb="replace")
@example(attacks=[deep(".news-000000000000")], verb="optout")
@example(attacks=[deep("news/arrays")], verb="verify")
@example(attacks=[like_a_run], verb="verify")
@example(attacks=[CERTIFICATES[0]], verb="verify, certificate")
def test_nothing_outside_a_hostile_model_directory_changes(home, attacks, verb):
    strike(home, attacks, verb)


@pytest.mark.parametrize("name", ["..", "../victim", "ABSOLUTE", ".", ["news"]])
@pytest.mark.parametrize("verb", ["optout code", "replace", "verify", "inspect --journal"])
def test_a_journal_with_an_impossible_expert_name_is_refused(home, verb, name):
    assert strike(home, [resolved(journal_names, name)], verb) == "refused"


@pytest.mark.parametrize("verb", SLOW)
@pytest.mark.parametrize("place", ["tokenizer.json", "news", "news/arrays", "journal.jsonl", "extra"])
def test_commands_that_compute_change_nothing_outside_a_hostile_model(home, verb, place):
    strike(home, [link(place, "SELF" if place != "extra" else "victim")], verb)


@pytest.mark.parametrize("verb", ["optout", "optout code", "replace", "sign"])
@pytest.mark.parametrize(
    "attack",
    [
        link("extra"),
        link(".model.json.partial-00000000"),
        link("extra", "victim"),
        lambda model: (model / "notes.txt").write_text("mine"),
    ],
)
def test_a_change_in_place_refuses_entries_that_no_command_makes(home, verb, attack, capsys):
    assert strike(home, [attack], verb) == "refused"
    said = capsys.readouterr().err
    assert "move it away" in said or "do not use this directory" in said


def test_verify_states_a_remedy_for_each_strange_entry(home, tmp_path):
    model = shutil.copytree(home / "model", tmp_path / "model")
    (model / ".model.json.partial-00000000").symlink_to(home / "victim.txt")
    (model / ".journal.jsonl.partial-00000000").write_text("")
    (model / "notes.txt").write_text("mine")
    found = {f.subject: f.remedy for f in verify_model(model) if not f.ok}
    assert "do not use this directory" in found.pop(".model.json.partial-00000000")
    assert "run that command again" in found.pop(".journal.jsonl.partial-00000000")
    assert "move it away" in found.pop("notes.txt")
    assert found == {}


@pytest.mark.parametrize("verb", ["optout", "optout code", "optout, certificate", "replace", "verify"])
@pytest.mark.parametrize("name", ["code", "news"])
def test_a_package_beside_the_one_that_readers_use_is_refused_until_it_is_moved_away(home, verb, name, capsys):
    """It is checked by nobody: it may hold anything, such as the bytes of an expert that opts out."""
    assert strike(home, [staged_beside(name)], verb) == "refused"
    said = capsys.readouterr().err
    assert "move it away" in said
    assert "restore it" not in said

    def obeyed(model):
        staged_beside(name)(model)
        (model / name).rename(model.parent / "away")

    assert strike(home, [obeyed], verb) == "done"


@pytest.mark.parametrize("verb", ["optout", "replace"])
@pytest.mark.parametrize("kind", ["a file", "another package"])
def test_a_folder_that_is_not_the_package_the_journal_names_is_moved_away(home, verb, kind, capsys):
    def zed(model):
        journal_names("zed")(model)
        if kind == "a file":
            (model / "zed").mkdir()
            (model / "zed" / "a").write_text("x")
        else:
            shutil.copytree(home / "code2", model / "zed")

    assert strike(home, [zed], "verify") == strike(home, [zed], verb) == "refused"
    assert capsys.readouterr().err.count("move it away") == 2
    assert strike(home, [zed, lambda model: (model / "zed").rename(model.parent / "zed")], verb) == "done"


@pytest.mark.parametrize(
    "attack",
    [
        deep(".news-000000000000"),
        deep(".code-000000000000"),
        deep(f"..news-{'0' * 64}.partial-00000000"),
        deep(f"...news-{'0' * 64}.partial-00000000.partial-11111111"),  # a kill while a partial directory is written
    ],
)
def test_depth_keeps_no_expert_from_leaving(home, tmp_path, attack):
    model = shutil.copytree(home / "model", tmp_path / "home" / "model")
    for name in ("news", "code", "code2"):
        shutil.copytree(home / name, tmp_path / "home" / name)
    attack(model)
    try:
        opt_out(model, "news", certificate=tmp_path / "proof.json")
        assert all(check.ok for check in verify(model, certificate=tmp_path / "proof.json"))
        left = merge(home / "release", [home / "code"], tmp_path / "never")
        assert contents(model) == contents(left.path)
    finally:
        delete(model)


def test_a_deep_partial_directory_beside_a_new_model_blocks_nothing(home, tmp_path):
    deep(".model.partial-00000000")(tmp_path)
    try:
        merge(home / "release", [home / "news"], tmp_path / "model")
        assert {path.name for path in tmp_path.iterdir()} == {"model"}
    finally:
        delete(tmp_path / ".model.partial-00000000")


@pytest.mark.parametrize("attack", CERTIFICATES)
def test_a_certificate_with_values_of_other_types_is_not_ok(home, tmp_path, attack):
    shutil.copy(home / "proof.json", tmp_path / "proof.json")
    attack(tmp_path / "model")
    assert [check.ok for check in verify_certificate(tmp_path / "proof.json", home / "model")] == [False]


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_commands_succeed_on_a_model_that_is_not_hostile(home, verb):
    wants = "refused" if verb in ("sign model", "sign package", "verify, certificate") else "done"
    assert strike(home, [lambda model: None], verb) == wants


def test_a_certificate_in_a_missing_folder_is_refused_and_the_model_is_unchanged(home, tmp_path):
    model = shutil.copytree(home / "model", tmp_path / "model")
    with pytest.raises(FlexMoEError, match="No such file"):
        opt_out(model, "news", certificate=tmp_path / "nowhere" / "proof.json")
    assert contents(model, leave_out=()) == contents(home / "model", leave_out=())


def test_partial_files_of_interrupted_writes_are_removed_by_the_next_change(home, tmp_path):
    model = shutil.copytree(home / "model", tmp_path / "model")
    (model / ".model.json.partial-00000000").write_text("")
    opt_out(model, "news")
    assert [p.name for p in model.iterdir() if p.name.startswith(".")] == []


def test_a_link_named_like_a_partial_folder_blocks_nothing(home, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("")
    (tmp_path / ".model.partial-00000000").symlink_to(tmp_path / "victim")
    merge(home / "release", [home / "news"], tmp_path / "model")
    assert (tmp_path / "victim" / "mine").exists()


def test_a_folder_that_the_journal_names_with_another_digest_is_not_erased(home, tmp_path):
    """The user's own folder in the model directory, which the sender guessed and named as an expert that left."""
    model = shutil.copytree(home / "model", tmp_path / "model")
    shutil.copytree(home / "news", tmp_path / "news")
    shutil.copytree(home / "code2", model / "mine")
    journal_names("mine")(model)
    before = contents(model / "mine")
    with pytest.raises(FlexMoEError, match="mine"):
        opt_out(model, "code")
    assert contents(model / "mine") == before
    assert open_model(model).experts == ("public", "code", "news")


def test_the_journal_names_every_expert_by_its_digest(home, tmp_path):
    model = shutil.copytree(home / "model", tmp_path / "model")
    opt_out(model, "news")
    for entry in read_journal(model):
        assert {*entry.manifests} == {*entry.experts}
    assert read_journal(model)[-1].manifests == {
        n: m.digest for n, m in open_model(model).manifests.items() if n != "trunk"
    }
