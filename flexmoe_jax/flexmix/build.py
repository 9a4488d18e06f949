"""The mini-FlexMix: a public split and closed domains of real text, built from pinned wheels.

    OUT/mix.json                        recipe, pins, shares, sha256 of the files, what they contain
    OUT/<domain>/{train,heldout}.jsonl  one document per line, ordered by hash: any prefix is a random sample

A group of documents goes to exactly one of three places: its domain's training part, its domain's held-out part, or
the public training part. The public part takes a share of every chosen closed domain, which the owner then does not
have; the field "domain" records the origin. The same arguments give the same bytes. News texts belong to their
publishers and posts to their authors: build a mix that holds them where you need it, never commit or publish it.
"""

import collections
import contextlib
import hashlib
import json
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flexmoe_jax.data.sources import Document, json_line
from flexmoe_jax.data.wheels import fetch
from flexmoe_jax.errors import ArtifactError, DataError, FlexMoEError, did_you_mean
from flexmoe_jax.files import default_cache, new_directory, remove_directory, sha256_file
from flexmoe_jax.flexmix.recipes import RECIPE_VERSION, RECIPES
from flexmoe_jax.flexmix.splits import Part, make_part
from flexmoe_jax.foreign import read_bytes
from flexmoe_jax.json_files import MAX_JSON_BYTES, parse_json
from flexmoe_jax.progress import track

DOMAINS = tuple(RECIPES)
STANDARD = tuple(name for name, recipe in RECIPES.items() if not recipe.on_request)  # those of a mix by default


def build(
    out: str | pathlib.Path,
    *,
    domains: Iterable[str] = STANDARD,
    public_share: float = 0.08,
    heldout_share: float = 0.05,
    cache: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Builds the mix in the new folder `out` and returns the content of its `mix.json`.

    `public_share` and `heldout_share` are shares of a domain's bytes, met to within one group; math is held out by
    MATH-500 instead. With fewer `domains` ("public" must be among them) only their wheels are fetched, only they
    contribute to the public split, and duplicates are searched only among them. Wheels and the built mix are kept in
    `cache` ($FLEXMOE_CACHE, else ~/.cache/flexmoe). An `out` that already holds this mix is left unchanged. A mix
    appears at `out` as a whole or not at all, and several processes may build the same mix at once.

    Raises DataError for unknown domains, impossible shares, an `out` with other content and a failed download, and
    ArtifactError where a folder cannot be written.
    """
    chosen = _chosen(domains)
    _check_shares(public_share, heldout_share)
    out, cache = pathlib.Path(out), pathlib.Path(cache) if cache else default_cache()
    recipe = _recipe(chosen, public_share, heldout_share)
    key = recipe["key"]
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return _existing(out, key)
    built = cache / "mixes" / key
    if built.exists() and not _intact(built, key):
        remove_directory(built)
    if not built.exists():
        wheels = fetch({wheel for domain in chosen for wheel in RECIPES[domain].wheels}, cache / "wheels")
        _new_mix(built, key, lambda folder: _write_mix(folder, wheels, recipe))
    with contextlib.suppress(OSError):
        out.rmdir()  # an empty folder may be given
    _new_mix(out, key, lambda folder: shutil.copytree(built, folder, dirs_exist_ok=True))
    return _existing(out, key)


def read_mix(folder: str | pathlib.Path) -> dict[str, Any]:
    """The content of a mix's `mix.json`; DataError when there is none."""
    path = pathlib.Path(folder) / "mix.json"
    try:
        return parse_json(read_bytes(path, MAX_JSON_BYTES, DataError), path)
    except FlexMoEError as error:
        raise DataError(f"{folder} is not a mix: {error.what}", "make one with `flexmoe data build`") from error


def _chosen(domains: Iterable[str]) -> list[str]:
    domains = set(domains)
    for name in sorted(domains - set(DOMAINS)):
        raise DataError(f"no domain {name!r}", did_you_mean(name, DOMAINS))
    if "public" not in domains:
        raise DataError("the selection has no 'public' domain", "add it: every model starts from the public split")
    return [name for name in DOMAINS if name in domains]


def _check_shares(public_share: float, heldout_share: float) -> None:
    if not (0 <= public_share <= 0.5 and 0 < heldout_share <= 0.5):
        raise DataError(
            f"public share {public_share} and held-out share {heldout_share}",
            "give 0 to 0.5 for the public share, and above 0 up to 0.5 for the held-out one",
        )


def _recipe(chosen: list[str], public_share: float, heldout_share: float) -> dict[str, Any]:
    """Everything that determines the bytes of the mix, and the key made of it."""
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


def _existing(out: pathlib.Path, key: str) -> dict[str, Any]:
    found = read_mix(out).get("key") if (out / "mix.json").is_file() else "no mix"
    if found != key:
        raise DataError(
            f"{out} is not empty and holds {found}, wanted mix {key}", "give a new folder, or remove this one"
        )
    if not _intact(out, key):
        raise DataError(f"{out} is mix {key}, but a file in it is missing or altered", "remove it and build again")
    return read_mix(out)


def _intact(folder: pathlib.Path, key: str) -> bool:
    """Whether `folder` is the mix with this key and every file has the recorded sha256."""
    with contextlib.suppress(DataError, OSError, KeyError):
        mix = read_mix(folder)
        files = mix["files"].items()
        return mix["key"] == key and all(sha256_file((folder / name).resolve()) == sha256 for name, sha256 in files)
    return False


def _new_mix(path: pathlib.Path, key: str, fill: Callable[[pathlib.Path], Any]) -> None:
    """Makes the folder `path` with `fill`; another process that makes the same mix may finish first."""
    try:
        with new_directory(path) as folder:
            fill(folder)
    except ArtifactError:
        if not _intact(path, key):
            raise


def _write_mix(folder: pathlib.Path, wheels: Mapping[str, pathlib.Path], recipe: Mapping[str, Any]) -> None:
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
            files[f"{name}/{split}.jsonl"] = sha256_file(path)
        summary[name] = _summary(splits, part.given)
        if name == "public":
            composition = _by("domain", splits["train"])
    mix = {**recipe, "files": files, "summary": summary, "public_composition": composition}
    # Not `write_json`: the same arguments must give the same bytes in every version.
    (folder / "mix.json").write_bytes((json.dumps(mix, indent=1, ensure_ascii=False) + "\n").encode())


def _write_documents(path: pathlib.Path, documents: Iterable[Document]) -> None:
    with path.open("wb") as file:
        file.writelines(json_line(document) for document in sorted(documents, key=lambda document: document.id))


def _summary(splits: Mapping[str, list[Document]], given: list[Document]) -> dict[str, Any]:
    everything = [document for documents in splits.values() for document in documents]
    return {
        **{split: _size(documents) for split, documents in splits.items()},
        "given_to_public": _size(given),
        "licenses": _by("license", everything),
        "sources": _by("source", everything),
    }


def _by(field: str, documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Documents and bytes by the value of `field`, in alphabetical order."""
    parts = collections.defaultdict(list)
    for document in documents:
        parts[getattr(document, field)].append(document)
    return {value: _size(parts[value]) for value in sorted(parts)}


def _size(documents: list[Document]) -> dict[str, int]:
    return {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
