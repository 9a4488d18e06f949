"""Changes of a model directory in place: the lock, what may lie in it, and what interrupted changes leave."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.model_dir import (
    ModelDir,
    locate_package,
    open_model,
    read_model_json,
    staging_place,
    write_model_json,
)
from flexmoe_jax.artifacts.package import check_before_signing
from flexmoe_jax.artifacts.signature import write_signature
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError
from flexmoe_jax.files import final_name, lock_directory, remove_directory, remove_partial_files, sync_directory
from flexmoe_jax.tree import PUBLIC, TRUNK

RUN_AGAIN = "run that command again"
_INTERRUPTED = ("was left by an interrupted command", RUN_AGAIN)
_UNKNOWN = ("was not made by a flexmoe command", "move it away")
_ANOTHER = ("is not the package that model.json or the journal names", "move it away")
_LINK = ("is a link", "do not use this directory, or replace the link with its target")
_STAGED = re.compile(r"\.(.+)-([0-9a-f]{64}|[0-9a-f]{12})")  # 12 digits: by earlier versions


@contextlib.contextmanager
def changing(path: pathlib.Path, *, signatures: bool = True) -> Iterator[ModelDir]:
    """Locks the model directory `path` for a change in place, and yields it with every package in its place.

    What interrupted changes left is deleted: partial files at once, staged packages when the block succeeds.
    `signatures` as of `open_model`. ArtifactError if another process holds the directory, or it has entries that no
    command of this package makes.
    """
    with lock_directory(path):
        check_entries(path, but=RUN_AGAIN)
        model = open_model(path, signatures=signatures)
        remove_partial_files(path)
        settle(model)
        yield model
        remove_leftovers(path)


def settle(model: ModelDir) -> None:
    """Moves the packages of `model` that are staged to their places."""
    for name in model.manifests:
        if (located := model.package(name)) != model.path / name:
            os.rename(located, model.path / name)
            sync_directory(model.path)


def remove_leftovers(path: pathlib.Path) -> None:
    """Deletes what interrupted changes staged in the model directory `path`, whose packages must be in their places."""
    for entry in sorted(path.iterdir()):
        if _STAGED.fullmatch(final_name(entry.name)):
            remove_directory(entry)


def sign_release(path: pathlib.Path | str, key: pathlib.Path | str, version: int) -> ModelDir:
    """Signs trunk and public expert of the public release `path`, in place, and records both in model.json.

    `key` is a private key file, `version` counts from 1. Both packages are read and checked first. ArtifactError for a
    model of several owners or with damage, and as of `sign_package`.
    """
    path = pathlib.Path(path)
    with changing(path, signatures=False) as release:
        if {*release.manifests} != {TRUNK, PUBLIC}:
            what = f"{path} is a model of several owners"
            raise ArtifactError(what, "let each owner sign their own package, then merge")
        for name in release.manifests:
            check_before_signing(path / name)
        for name in release.manifests:
            write_signature(path / name, key, version)
        write_model_json(path, (PUBLIC,), release.wanted_top_k)
        model = open_model(path)
        append_entry(path, "signed", model.expert_digests, model.digest, version=version)
        return model


def check_entries(path: pathlib.Path, but: str = "") -> None:
    """ArtifactError if `strange_entries` finds one that has another remedy than `but`."""
    for check in strange_entries(path):
        if check.remedy != but:
            raise ArtifactError(f"{path / check.subject} {check.detail}", f"{check.remedy}, then run this one again")


def strange_entries(path: pathlib.Path) -> list[Check]:
    """Failed checks of the entries of the model directory `path` that do not belong to the model of model.json.

    What belongs there: model.json, the journal, the tokenizer's files, and one directory for each digest of model.json.
    What an interrupted change leaves has the remedy `RUN_AGAIN`: partial files of these, staged packages, and a package
    of the journal's last line, with the digest of that line, that model.json no longer names.
    """
    fields, digests = read_model_json(path)
    files = {"model.json", JOURNAL, *fields["tokenizer"]}
    folders = {locate_package(path, name, digest).name for name, digest in digests.items()}
    left = _left(path, digests)
    checks = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        target = final_name(entry.name)
        known, found = False, _UNKNOWN
        if entry.is_symlink():
            found = _LINK
        elif entry.is_file():
            known, found = entry.name in files, _INTERRUPTED if target in files else _UNKNOWN
        elif entry.is_dir():
            staged = _STAGED.fullmatch(target)
            interrupted = staged[1] in {*digests, *left} if staged else _is_left(path, entry.name, left)
            known, foreign = entry.name in folders, _ANOTHER if entry.name in {*digests, *left} else _UNKNOWN
            found = _INTERRUPTED if interrupted else foreign
        checks += [] if known else [Check(entry.name, False, *found)]
    return checks


def _left(path: pathlib.Path, digests: Mapping[str, str]) -> dict[str, str | None]:
    """{name: manifest digest, if recorded} of the experts of the journal's last line that model.json does not name."""
    try:
        last = read_journal(path)[-1]
    except ArtifactError:  # `verify_model` and the change itself report it
        return {}
    return {name: last.manifests.get(name) for name in last.experts if name not in digests}


def _is_left(path: pathlib.Path, name: str, left: Mapping[str, str | None]) -> bool:
    """Whether the folder `name` is the package of an expert that `left`, which is to be erased and not staged yet."""
    try:
        digest = left[name]
        return read_manifest(path / name, name).digest == digest and not staging_place(path, name, digest).exists()
    except (KeyError, FlexMoEError):
        return False
