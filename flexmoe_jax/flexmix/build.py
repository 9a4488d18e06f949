"""The mini-FlexMix: a public split and seven closed domains of real text, built from pinned wheels.

    OUT/mix.json                        recipe, pins, shares, hashes of the files, what is in them
    OUT/<domain>/{train,heldout}.jsonl  one document a line, ordered by hash: any prefix is a random sample

A group of documents goes to exactly one of three places: its domain's training part, its domain's held-out part, or
the public training part, which takes a share of every chosen closed domain (field "domain" says which) and never gives
it to the owner. The same arguments give the same bytes. News texts belong to their publishers and posts to their
posters: build a mix that holds them where you need it, never commit or publish it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from flexmoe_jax.data.sources import Document
from flexmoe_jax.data.wheels import fetch
from flexmoe_jax.errors import DataError, did_you_mean
from flexmoe_jax.files import default_cache
from flexmoe_jax.flexmix.recipes import RECIPE_VERSION, RECIPES
from flexmoe_jax.flexmix.splits import Part, make_part
from flexmoe_jax.progress import track

DOMAINS = tuple(RECIPES)


def build(
    out: str | Path,
    *,
    domains: Iterable[str] = DOMAINS,
    public_share: float = 0.08,
    heldout_share: float = 0.05,
    cache: str | Path | None = None,
) -> dict:
    """Builds the mix in the new folder `out` and returns what its `mix.json` says.

    `public_share` and `heldout_share` are shares of a domain's bytes, met to within one group; math is held out by
    MATH-500 instead. With fewer `domains` ("public" is always one of them) only their wheels are fetched, only they
    give to the public split, and duplicates are looked for among them alone. Wheels and the built mix are kept in
    `cache` ($FLEXMOE_CACHE, else ~/.cache/flexmoe). An `out` that already holds this very mix is left as it is. Raises
    DataError for unknown domains, impossible shares, an `out` with other content, and a failed download; `out` is then
    untouched.
    """
    chosen = _chosen(domains)
    _check_shares(public_share, heldout_share)
    out, cache = Path(out), Path(cache) if cache else default_cache()
    recipe = _recipe(chosen, public_share, heldout_share)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return _existing(out, recipe["key"])
    built = cache / "mixes" / recipe["key"]
    if not _intact(built, recipe["key"]):
        shutil.rmtree(built, ignore_errors=True)
        wheels = fetch({wheel for domain in chosen for wheel in RECIPES[domain].wheels}, cache / "wheels")
        with _new_folder(built) as folder:
            _write_mix(folder, wheels, recipe)
    with _new_folder(out) as folder:
        shutil.copytree(built, folder, dirs_exist_ok=True)
    return _existing(out, recipe["key"])


def read_mix(folder: str | Path) -> dict:
    """The content of a mix's `mix.json`; DataError when there is none."""
    path = Path(folder) / "mix.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no mix: {error}", "make one with `flexmoe data build`") from error


def _chosen(domains):
    domains = set(domains)
    for name in sorted(domains - set(DOMAINS)):
        raise DataError(f"no domain {name!r}", did_you_mean(name, DOMAINS))
    if "public" not in domains:
        raise DataError("the selection has no 'public' domain", "add it: every model starts from the public split")
    return [name for name in DOMAINS if name in domains]


def _check_shares(public_share, heldout_share):
    if not (0 <= public_share <= 0.5 and 0 < heldout_share <= 0.5):
        raise DataError(
            f"public share {public_share} and held-out share {heldout_share}",
            "give 0 to 0.5 for the public share, and above 0 up to 0.5 for the held-out one",
        )


def _recipe(chosen, public_share, heldout_share):
    """What decides every byte of the mix, and the key made of it."""
    wheels = sorted({wheel for name in chosen for wheel in RECIPES[name].wheels})
    recipe = {
        "recipe": RECIPE_VERSION,
        "domains": chosen,
        "public_share": float(public_share),
        "heldout_share": float(heldout_share),
        "max_mb": {name: RECIPES[name].max_mb for name in chosen},
        "wheels": [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256} for wheel in wheels],
    }
    return {"key": hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16], **recipe}


def _existing(out, key):
    found = read_mix(out).get("key") if (out / "mix.json").is_file() else "no mix"
    if found != key:
        raise DataError(
            f"{out} is not empty and holds {found}, wanted mix {key}", "give a new folder, or remove this one"
        )
    if not _intact(out, key):
        raise DataError(f"{out} is mix {key}, but a file in it is missing or altered", "remove it and build again")
    return read_mix(out)


def _intact(folder, key):
    """Whether `folder` is the mix of that key and every file has the recorded hash."""
    with contextlib.suppress(DataError, OSError, KeyError):
        mix = read_mix(folder)
        return mix["key"] == key and all(_sha256(folder / name) == sha256 for name, sha256 in mix["files"].items())
    return False


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _new_folder(path):
    """A temporary folder beside `path`, which takes its name when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's are private
        yield partial
        try:
            os.replace(partial, path)
        except OSError:
            if not path.is_dir():  # else another process made the same folder first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_mix(folder, wheels, recipe):
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    with contextlib.ExitStack() as stack, track("building", len(recipe["domains"]), "domains") as advance:
        archives = {name: stack.enter_context(zipfile.ZipFile(path)) for name, path in wheels.items()}
        for name in recipe["domains"]:
            share = 0.0 if name == "public" else recipe["public_share"]
            parts[name] = make_part(name, archives, seen, share, recipe["heldout_share"])
            advance(1, name)
    files, summary = {}, {}
    for name, part in parts.items():
        looks_like = [document for other in parts.values() for document in other.given] if name == "public" else []
        splits = {"train": part.train + looks_like, "heldout": part.heldout}
        (folder / name).mkdir()
        for split, documents in splits.items():
            path = folder / name / f"{split}.jsonl"
            _write_documents(path, documents)
            files[f"{name}/{split}.jsonl"] = _sha256(path)
        summary[name] = _summary(splits, part.given)
        if name == "public":
            composition = _by("domain", splits["train"])
    mix = {**recipe, "files": files, "summary": summary, "public_composition": composition}
    (folder / "mix.json").write_text(json.dumps(mix, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_documents(path, documents: list[Document]):
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in sorted(documents, key=lambda document: document.id):
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")


def _summary(splits, given):
    everything = [document for documents in splits.values() for document in documents]
    return {
        **{split: _size(documents) for split, documents in splits.items()},
        "given_to_public": _size(given),
        "licenses": _by("license", everything),
        "sources": _by("source", everything),
    }


def _by(field, documents):
    """Documents and bytes by the value of `field`, in alphabetical order."""
    parts = collections.defaultdict(list)
    for document in documents:
        parts[getattr(document, field)].append(document)
    return {value: _size(parts[value]) for value in sorted(parts)}


def _size(documents):
    return {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
