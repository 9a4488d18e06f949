"""Nothing outside a model directory changes, whatever its sender wrote into it and whichever command is run on it."""

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

from flexmoe_jax.artifacts.digest import json_bytes, seal
from flexmoe_jax.artifacts.journal import FIRST, read_journal
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.cli.main import main
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.errors import FlexMoEError
from tests.artifacts.tiny import contents, make_expert, make_release
from tests.faults.hostile import reseal

Attack = Callable[[pathlib.Path], object]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of somebody who received `model` and `release`, with things of their own beside them."""
    root = tmp_path_factory.mktemp("home")
    release = make_release(root / "release")
    for name in ("code", "news"):
        make_expert(root / name, name, release)
    make_expert(root / "code2", "code", release, seed=2)
    merge(root / "release", [root / "code", root / "news"], root / "model")
    merge(root / "release", [root / "code", root / "news"], root / "before")
    opt_out(root / "before", "news", root / "other", certificate=root / "proof.json")
    shutil.rmtree(root / "before")
    shutil.rmtree(root / "other")
    assert main(["keygen", str(root / "key"), "--owner", "public"]) == 0
    (root / "victim").mkdir()
    shutil.copytree(root / "news", root / "victim" / "package")
    (root / "victim" / "notes.txt").write_text("mine")
    (root / "victim.txt").write_text("mine")
    return root


# Every command that takes a model directory, as somebody types it in the folder where the directory lies.
VERBS = {
    "optout": ["optout", "model", "--expert", "news"],
    "optout code": ["optout", "model", "--expert", "code"],
    "optout, certificate": ["optout", "model", "--expert", "news", "--certificate", "out/proof.json"],
    "optout --out": ["optout", "model", "--expert", "news", "--out", "out/model"],
    "replace": ["replace", "model", "--expert", "code2"],
    "sign": ["sign", "release", "--key", "key", "--version", "1"],
    "sign model": ["sign", "model", "--key", "key", "--version", "1"],
    "sign package": ["sign", "model/news", "--key", "key", "--version", "1"],
    "verify": ["verify", "model"],
    "verify --quick": ["verify", "model", "--quick"],
    "verify, certificate": ["verify", "model", "--certificate", "proof.json"],
    "inspect": ["inspect", "model"],
    "inspect --journal": ["inspect", "model", "--journal"],
    "merge": ["merge", "--public", "release", "--expert", "news", "--out", "out/model"],
    "merge --link": ["merge", "--public", "release", "--expert", "news", "--out", "out/model", "--link"],
    "export-hf": ["export-hf", "model", "--out", "out/hf", "--no-logits", "--custom-code"],
    "generate": ["generate", "model", "--prompt", "a", "--max-new-tokens", "1"],
    "eval": ["eval", "model", "--data", "victim", "--seq-len", "8"],
    "tune": ["tune", "model", "--proxies", "victim", "--public-data", "victim", "--out", "out/tuned"],
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
    """Runs the command where the attacked directory lies; whether anything outside it changed is asserted."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "home"
        shutil.copytree(home, root, symlinks=True)
        (root / "run.py").write_text(RUN)
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
            ".proof.json.pending",
        }
        return "refused" if code else "done"


RUN = """
from flexmoe_jax.cli.configs import run_config

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
    """The journal says that `name`, too, was an expert before model.json changed: an opt-out that was interrupted."""

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
    """A package says that `name` had a part in it."""

    def attack(model):
        reseal(model / "public", lambda f: f["record"].update(tuned={"with": [name]}))
        manifest = json.loads((model / "public/manifest.json").read_text())
        shutil.rmtree(model / "news", ignore_errors=True)
        rewrite_model(
            model,
            lambda f: f.update(experts=[{"name": "public", "manifest": manifest["digest"]}]),
        )

    return attack


HOSTILE_NAMES = ("..", ".", "", "/", "../victim", "victim/../../victim", "../victim.txt", "a\0b", "trunk", "model.json",
                 "x" * 300, None, 3, ["news"], {"a": 1})  # fmt: skip
names = st.sampled_from(HOSTILE_NAMES) | st.text(max_size=6) | st.just("ABSOLUTE")


def resolved(make: Callable[..., Attack], name) -> Attack:
    """`make(name)`, in which ABSOLUTE is the victim's own folder."""
    return lambda model: make(str(model.parent / "victim") if name == "ABSOLUTE" else name)(model)


named = st.builds(resolved, st.sampled_from((journal_names, model_names, tuned_with)), names)
attacks = st.lists(named, min_size=1, max_size=2)


@settings(max_examples=150)
@given(attacks=attacks, verb=st.sampled_from(QUICK))
@example(attacks=[resolved(journal_names, "ABSOLUTE")], verb="optout code")
@example(attacks=[resolved(journal_names, "../victim")], verb="replace")
def test_nothing_outside_a_hostile_model_directory_changes(home, attacks, verb):
    strike(home, attacks, verb)


@pytest.mark.parametrize("name", ["..", "../victim", "ABSOLUTE", ".", ["news"]])
@pytest.mark.parametrize("verb", ["optout code", "replace", "verify", "inspect --journal"])
def test_a_journal_that_names_what_is_no_expert_is_refused(home, verb, name):
    assert strike(home, [resolved(journal_names, name)], verb) == "refused"


def test_what_the_journal_names_without_its_digest_is_not_erased(home, tmp_path):
    """A folder of one's own in the model directory, which the sender guessed and named as an expert that left."""
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
