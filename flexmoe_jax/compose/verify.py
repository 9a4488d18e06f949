"""Verification of a package, a model directory, or a run directory."""

import dataclasses
import os
import pathlib

from flexmoe_jax.artifacts.checkpoints import verify_run
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.package import verify_package
from flexmoe_jax.artifacts.signature import Trust
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.errors import ArtifactError, Check

_PRODUCTS = {"package": verify_package, "model": verify_model}  # what a training writes into its run directory


def verify(
    path: pathlib.Path | str,
    *,
    quick: bool = False,
    trust: Trust | None = None,
    certificate: pathlib.Path | str | None = None,
) -> list[Check]:
    """Checks of the package, model or run directory at `path`, at least one; damage is never raised.

    Of a package and a model every file and tensor is checked; of a run the checkpoints and its package or model. A
    directory with model.json is a model, one with manifest.json a package, and one with `checkpoints/` a run. `quick`
    reads names, sizes and headers, not contents. `trust` holds the keys that signatures are checked against
    (`artifacts.signature.read_trusted`). A model is also checked against an opt-out `certificate`. ArtifactError if
    `path` is none of the three, or a certificate or trust is given for something that has none.
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
    if not (path / "checkpoints").is_dir():
        what = f"{path} has no model.json, manifest.json or checkpoints"
        raise ArtifactError(what, "give a package, a model or a run directory, or restore it from its source")
    if trust is not None:
        what = f"{path} is a run directory, which has no signature"
        raise ArtifactError(what, f"give what it made: {' or '.join(str(path / name) for name in _PRODUCTS)}")
    checks = verify_run(path, quick=quick)
    for product, verify_it in _PRODUCTS.items():
        if os.path.lexists(path / product):
            rows = verify_it(path / product, quick=quick)
            checks += [dataclasses.replace(row, subject=f"{product}/{row.subject}") for row in rows]
    return checks
