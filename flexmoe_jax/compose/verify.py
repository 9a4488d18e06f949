"""Verification of a package, a model directory, a run directory, or a token store."""

import dataclasses
import os
import pathlib

from flexmoe_jax.artifacts.checkpoints import verify_run
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.package import verify_package
from flexmoe_jax.artifacts.signature import Trust
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.data.store import verify_store
from flexmoe_jax.errors import ArtifactError, Check

_PRODUCTS = {"package": verify_package, "model": verify_model}  # what a training writes into its run directory
_TOKENS = ("tokens*/", "public_tokens*/")


def verify(
    path: pathlib.Path | str,
    *,
    quick: bool = False,
    trust: Trust | None = None,
    certificate: pathlib.Path | str | None = None,
) -> list[Check]:
    """Checks of the package, model, run directory or token store at `path`, at least one; damage is never raised.

    Of a package and a model every file and tensor is checked; of a run the checkpoints, its tokens, and its package or
    model. A directory with model.json is a model, one with manifest.json a package, one with `checkpoints/` a run, and
    one with index.json a token store. `quick`
    reads names, sizes and headers, not contents. `trust` holds the keys that signatures are checked against
    (`artifacts.signature.read_trusted`). A model is also checked against an opt-out `certificate`. ArtifactError if
    `path` is none of these, or a certificate or trust is given for something that has none.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", "give a package, a model or a run directory")
    if os.path.lexists(path / "model.json"):
        checks = verify_model(path, quick=quick, trust=trust)
        return checks if certificate is None else checks + verify_certificate(certificate, path)
    if certificate is not None:
        what = f"{path} is not a model directory"
        raise ArtifactError(what, "give the directory of the model that the certificate is about")
    if os.path.lexists(path / "manifest.json"):
        return verify_package(path, quick=quick, trust=trust)
    store = os.path.lexists(path / "index.json")
    if not store and not (path / "checkpoints").is_dir():
        what = f"{path} has no model.json, manifest.json, checkpoints or index.json"
        remedy = "give a package, a model, a run directory or a token store, or restore it from its source"
        raise ArtifactError(what, remedy)
    if trust is not None:
        what = f"{path} is a {'token store' if store else 'run directory'}, which has no signature"
        raise ArtifactError(what, f"give what it made: {' or '.join(str(path / name) for name in _PRODUCTS)}")
    if store:
        return verify_store(path, quick=quick)
    checks = verify_run(path, quick=quick)
    for tokens in sorted(entry for pattern in _TOKENS for entry in path.glob(pattern)):
        checks += [
            dataclasses.replace(row, subject=f"{tokens.name}/{row.subject}")
            for row in verify_store(tokens, quick=quick)
        ]
    for product, verify_it in _PRODUCTS.items():
        if os.path.lexists(path / product):
            rows = verify_it(path / product, quick=quick)
            checks += [dataclasses.replace(row, subject=f"{product}/{row.subject}") for row in rows]
    return checks
