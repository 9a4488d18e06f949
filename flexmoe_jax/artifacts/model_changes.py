"""Changes of a model directory in place: the lock, and entries that do not belong to the model."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.model_dir import ModelDir, locate_package, open_model, read_model_json, write_model_json
from flexmoe_jax.artifacts.signature import write_signature
from flexmoe_jax.errors import ArtifactError, Check
from flexmoe_jax.files import lock_directory, partial_of, remove_partial_files
from flexmoe_jax.tree import PUBLIC, TRUNK

INTERRUPTED = "was left by an interrupted command: run it again"
UNKNOWN = "not made by a flexmoe command: move it away"


@contextlib.contextmanager
def changing(path: pathlib.Path) -> Iterator[None]:
    """Locks the model directory `path` for a change in place, and deletes partial files of interrupted writes.

    ArtifactError if another process holds it, or it has entries that no command of this package makes.
    """
    with lock_directory(path):
        for check in strange_entries(path):
            if check.detail != INTERRUPTED:
                raise ArtifactError(f"{path / check.subject}: {check.detail}", "then run the command again")
        remove_partial_files(path)
        yield


def sign_release(path: pathlib.Path | str, key: pathlib.Path | str, version: int) -> ModelDir:
    """Signs trunk and public expert of the public release `path`, in place, and records both in model.json.

    `key` is a private key file, `version` counts from 1. ArtifactError for a model of several owners, and as of
    `sign_package`.
    """
    path = pathlib.Path(path)
    with changing(path):
        fields, digests = read_model_json(path)
        if {*digests} != {TRUNK, PUBLIC}:
            what = f"{path} is a model of several owners"
            raise ArtifactError(what, "let each owner sign their own package, then merge")
        for name in (TRUNK, PUBLIC):
            write_signature(path / name, key, version)
        write_model_json(path, (PUBLIC,), fields["top_k"])
        model = open_model(path)
        append_entry(path, "signed", model.expert_digests, model.digest, version=version)
        return model


def strange_entries(path: pathlib.Path) -> list[Check]:
    """Failed checks of the entries of the model directory `path` that do not belong to the model of model.json."""
    fields, digests = read_model_json(path)
    files, folders = {"model.json", JOURNAL, *fields["tokenizer"]}, {*digests}
    staged = {locate_package(path, name, digest).name for name, digest in digests.items()}
    try:
        left = {*read_journal(path)[-1].experts} - folders
    except ArtifactError:  # `_check_journal` and the change itself report it
        left = set()
    checks = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        target, detail = partial_of(entry.name) or entry.name, ""
        staging = re.fullmatch(r"\.(.+)-[0-9a-f]{12}", target)
        if entry.is_symlink():
            detail = "is a link: do not use this directory, or replace the link with its target"
        elif entry.is_dir():
            if target in left or (staging and staging[1] in folders | left and entry.name not in staged):
                detail = INTERRUPTED
            elif entry.name not in folders | staged:
                detail = UNKNOWN
        elif not entry.is_file() or target not in files:
            detail = UNKNOWN
        elif target != entry.name:
            detail = INTERRUPTED
        checks += [Check(entry.name, False, detail)] if detail else []
    return checks
