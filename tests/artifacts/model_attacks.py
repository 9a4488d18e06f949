"""Attacks on a model directory: what its sender can put into it, and beside it.

An attack gets the directory, in a folder with files of the user: `victim`, `victim.txt` and the packages `news`, `code`
and `code2`, of which the model has the first two.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

from hypothesis import strategies as st

from flexmoe_jax.artifacts.journal import FIRST
from flexmoe_jax.artifacts.sealed import json_bytes, seal
from flexmoe_jax.files import remove_directory
from tests.faults.hostile import reseal

Attack = Callable[[pathlib.Path], object]


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
        if not (model / "news").is_symlink():
            remove_directory(model / "news")
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
        place = place.replace(name.upper() + ".", digest)
    return place


def staged_beside(name: str) -> Attack:
    """The package that readers use lies in its staging place, and another one, with one file more, in its place."""

    def attack(model):
        staged = model / _with_digests(f".{name}-{name.upper()}.", model.parent)
        if (model / name).is_dir() and not os.path.lexists(staged):
            (model / name).rename(staged)
            shutil.copytree(model.parent / "code2", model / name)
            (model / name / "secret.bin").write_bytes(b"x" + (model.parent / "news/arrays/w_up/0.0.0").read_bytes())

    return attack


def deep(place: str, depth: int = 1100, name: str = "aaa") -> Attack:
    """A directory nested deeper than Python recurses, with a longer path than the system takes."""

    def attack(model):
        if (model / place).resolve() != model.resolve() / place:  # another attack made a link of it
            return
        (model / place).mkdir(parents=True, exist_ok=True)
        folder = os.open(model / place, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir(name, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.close(folder)

    return attack


DEPTHS = {"more levels than Python recurses": (1100, "a"), "a path that is too long": (40, "b" * 200)}


def like_a_run(model: pathlib.Path) -> None:
    """The folders of a run directory beside what the directory is."""
    for name in ("checkpoints", "digests"):
        (model / name).mkdir(exist_ok=True)


def certificate(change: Callable[[dict], object]) -> Attack:
    """Applies `change` to the user's certificate, and seals it."""

    def attack(model):
        path = model.parent / "proof.json"
        fields = json.loads(path.read_bytes())
        del fields["digest"]
        change(fields)
        path.write_bytes(json_bytes(seal(fields)))

    return attack


CERTIFICATES = (
    certificate(lambda f: f["removed"]["tensors"].update(w_up=["x"])),
    certificate(lambda f: f["removed"]["tensors"].update(w_up={"a": 1})),
    certificate(lambda f: f["removed"].update(name="../victim")),
    certificate(lambda f: f["removed"].update(content="x")),
    certificate(lambda f: f["remaining"].update(public=[1])),
    certificate(lambda f: f["scan"].update(found=[["x"]])),
    certificate(lambda f: f.update(label="perfect")),
    certificate(lambda f: f.update(model_before="")),
)


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
    ".code-000000000000",
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
beside = st.builds(staged_beside, st.sampled_from(("code", "news"))) | st.sampled_from((like_a_run, *CERTIFICATES))
attacks = st.lists(named | links | beside, min_size=1, max_size=2)
