"""No command that runs on a hostile model directory changes anything outside it."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexmoe_jax.artifacts.journal import FIRST, read_journal
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import json_bytes, seal
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.errors import FlexMoEError
from tests.faults.hostile import reseal
from tests.tiny import contents

Attack = Callable[[pathlib.Path], object]


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
    "tune": ["tune", "model", "--proxies", "proxies", "--public-data", "victim", "--out", "out/tuned", "--steps", "1"],
    "train": ["train", "--config=run.py"],
}
SLOW = ("export-hf", "generate", "eval", "tune", "train")
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
                found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


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
        assert code in (0, 1, 2), code
        assert state(root, own) == before
        assert {p.name for p in (root / "out").glob("*")} <= {
            "model",
            "proof.json",
            "hf",
            "tuned",
            "run",
            ".proof.json.pending",
        }
        return "refused" if code else "done"


RUN = """
from flexmoe_jax.experiment import run_config

def get_config(arg):
    return run_config(owner="law", public="model", data="victim", domain_vector="domain.json", out="out/run", steps=1,
                      batch_size=1, seq_len=8)
"""


def rewrite_journal(model: pathlib.Path, change: Callable[[dict], object]) -> None:
    """Applies `change` to the last line and seals the whole chain again."""
    lines = [json.loads(line) for line in (model / "journal.jsonl").read_bytes().splitlines()]
    change(lines[-1])
    prev, raw = FIRST, b""
    for fields in lines:
        fields |= {"prev": prev}
        fields.pop("digest")
        line = json.dumps(seal(fields), sort_keys=True, ensure_ascii=False).encode() + b"\n"
        prev, raw = hashlib.sha256(line).hexdigest(), raw + line
    (model / "journal.jsonl").write_bytes(raw)


def rewrite_model(model: pathlib.Path, change: Callable[[dict], object]) -> None:
    """Applies `change` to model.json, seals it, and makes the journal's last line agree."""
    fields = json.loads((model / "model.json").read_bytes())
    del fields["digest"]
    change(fields)
    (model / "model.json").write_bytes(json_bytes(seal(fields)))
    rewrite_journal(model, lambda line: line.update(model=seal(fields)["digest"]))


def journal_names(name) -> Attack:
    """The journal states that `name` was an expert too before model.json changed, as after an interrupted opt-out."""

    def attack(model):
        def change(line):
            line["experts"] = [*line["experts"], name]
            manifests = line["details"].setdefault("manifests", {})
            if isinstance(name, str):
                manifests[name] = json.loads((model.parent / "news/manifest.json").read_text())["digest"]

        rewrite_journal(model, change)

    return attack


def model_names(name, digest=None) -> Attack:
    """model.json names an expert `name`, or the manifest of news by `digest`."""

    def attack(model):
        def change(fields):
            row = {"name": name, "manifest": digest or fields["trunk"]}
            fields["experts"] = [*(r for r in fields["experts"] if r["name"] != name), row]

        rewrite_model(model, change)

    return attack


def tuned_with(name) -> Attack:
    """A package states that the data of `name` influenced it."""

    def attack(model):
        reseal(model / "public", lambda f: f["record"].update(tuned={"with": [name]}))
        manifest = json.loads((model / "public/manifest.json").read_text())
        shutil.rmtree(model / "news", ignore_errors=True)
        rewrite_model(
            model,
            lambda f: f.update(experts=[{"name": "public", "manifest": manifest["digest"]}]),
        )

    return attack


HOSTILE_NAMES = (
    "..",
    ".",
    "",
    "/",
    "../victim",
    "victim/../../victim",
    "../victim.txt",
    "a\0b",
    "trunk",
    "model.json",
    "x" * 300,
    None,
    3,
    ["news"],
    {"a": 1},
)
names = st.sampled_from(HOSTILE_NAMES) | st.text(max_size=6) | st.just("ABSOLUTE")


def resolved(make: Callable[..., Attack], name) -> Attack:
    """`make(name)`, in which ABSOLUTE is the victim's own folder."""
    return lambda model: make(str(model.parent / "victim") if name == "ABSOLUTE" else name)(model)


def link(place: str, target: str = "victim.txt") -> Attack:
    """A symbolic link in the model directory to a file or folder of the victim; NEWS and CODE2 stand for digests.

    With `target` SELF the entry itself is moved into the victim's folder, so that the link leads to the right bytes.
    """

    def attack(model):
        home = model.parent
        path = model / _with_digests(place, home)
        if not path.parent.is_dir():
            return
        if target == "SELF" and path.exists() and not path.is_symlink():
            moved = home / "victim" / place.replace("/", "_")
            path.rename(moved)
            path.symlink_to(moved)
        elif not os.path.lexists(path):
            path.symlink_to(home / target)

    return attack


def _with_digests(place: str, home: pathlib.Path) -> str:
    for name in ("news", "code", "code2"):
        digest = json.loads((home / name / "manifest.json").read_text())["digest"]
        place = place.replace(name.upper() + ".", digest[:12])
    return place


def hard_link(place: str) -> Attack:
    """A hard link to a file of the victim (carelessly unpacked archives make such links)."""
    return lambda model: os.path.lexists(model / place) or os.link(model.parent / "victim.txt", model / place)


LINKED_FILES = (
    ".model.json.partial",
    ".journal.jsonl.partial",
    ".tokenizer.json.partial",
    ".model.json.partial-00000000",
    ".journal.jsonl.partial-0123abcd",
    "tokenizer_config.json",
    "news/signature.json",
    "news/.signature.json.partial",
    "trunk/signature.json",
    "public/.signature.json.partial",
    "public/signature.json",
    "news/arrays/x",
    "extra",
)
LINKED_FOLDERS = (
    ".news-NEWS.",
    ".code-CODE.",
    ".code-CODE2.",
    "..code-CODE2..partial-00000000",
    "law",
    ".trunk-000000000000",
    "news/arrays/extra",
    ".model.partial-00000000",
    "extra",
)
MOVED = (
    "model.json",
    "journal.jsonl",
    "tokenizer.json",
    "trunk",
    "public",
    "news",
    "code",
    "news/arrays",
    "news/manifest.json",
    "public/arrays/w_up",
    "trunk/arrays/embed/0.0",
)
links = (
    st.builds(link, st.sampled_from(LINKED_FILES))
    | st.builds(link, st.sampled_from(LINKED_FOLDERS), st.sampled_from(("victim", "victim/package")))
    | st.builds(link, st.sampled_from(MOVED), st.just("SELF"))
    | st.builds(hard_link, st.sampled_from((".model.json.partial-00000000", "extra")))
)
named = st.builds(resolved, st.sampled_from((journal_names, model_names, tuned_with)), names)
attacks = st.lists(named | links, min_size=1, max_size=2)


@settings(max_examples=120)
@given(attacks=attacks, verb=st.sampled_from(QUICK))
@example(attacks=[resolved(journal_names, "ABSOLUTE")], verb="optout code")
@example(attacks=[resolved(journal_names, "../victim")], verb="replace")
@example(attacks=[link(".model.json.partial")], verb="optout")
@example(attacks=[link(".journal.jsonl.partial")], verb="replace")
@example(attacks=[link("trunk", "SELF")], verb="sign")
@example(attacks=[link("public/.signature.json.partial")], verb="sign")
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
    found = {f.subject: f.detail for f in verify_model(model) if not f.ok}
    assert "do not use this directory" in found.pop(".model.json.partial-00000000")
    assert "run it again" in found.pop(".journal.jsonl.partial-00000000")
    assert "move it away" in found.pop("notes.txt")
    assert found == {}


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
