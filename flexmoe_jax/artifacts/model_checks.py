"""Verification of a model directory: all digests, entries that do not belong there, and the journal."""

import dataclasses
import pathlib

from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.journal import read_journal
from flexmoe_jax.artifacts.low_rank import check_sums
from flexmoe_jax.artifacts.model_changes import RUN_AGAIN, strange_entries
from flexmoe_jax.artifacts.model_dir import ModelDir, open_model
from flexmoe_jax.artifacts.package import load_package, verify_package
from flexmoe_jax.artifacts.signature import Trust
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError
from flexmoe_jax.params import ranks_of
from flexmoe_jax.tree import PUBLIC


def verify_model(path: pathlib.Path | str, *, quick: bool = False, trust: Trust | None = None) -> list[Check]:
    """Checks of every part of a model directory: digests, strange entries, the journal; damage is never raised.

    `quick` does not read the contents of arrays; `trust` holds the trusted keys: see `verify_package`.
    """
    path = pathlib.Path(path)
    try:
        model = open_model(path)
    except FlexMoEError as error:
        return [Check("model", False, error.what, error.remedy)]
    checks = [Check("model.json", True, model.digest)]
    checks += [Check(name, True, digest) for name, digest in model.tokenizer.items()]
    for name in model.manifests:
        rows = verify_package(model.package(name), name, quick=quick, trust=trust)
        checks += [dataclasses.replace(row, subject=f"{name}/{row.subject}") for row in rows]
        if ranks_of(model.manifests[name].tensors) and not quick and all(row.ok for row in checks):
            checks.append(_check_sums(model, name))
    checks.append(_check_journal(model))
    return checks + strange_entries(path)


def _check_sums(model: ModelDir, name: str) -> Check:
    """Whether an expert's low-rank changes, whose tensors are as they should be, make usable matrices."""
    parts = (load_package(model.package(part), verify=False, mapped=True) for part in (name, PUBLIC))
    try:
        check_sums(name, *parts)
    except ArtifactError as error:
        return Check(f"{name}/sums", False, error.what, error.remedy)
    return Check(f"{name}/sums", True, "the changes and the public expert's matrices add up to finite values")


def _check_journal(model: ModelDir) -> Check:
    try:
        entries = read_journal(model.path)
    except ArtifactError as error:
        return Check(JOURNAL, False, error.what, error.remedy)
    if entries[-1].model != model.digest:
        detail = f"records {entries[-1].model}, model.json has {model.digest}, as after an interrupted command"
        return Check(JOURNAL, False, detail, RUN_AGAIN)
    return Check(JOURNAL, True, f"{len(entries)} entries")
