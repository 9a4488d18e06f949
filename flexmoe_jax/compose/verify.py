"""Verification of a package, a model directory, or a run directory."""

import pathlib

from flexmoe_jax.artifacts.checkpoints import verify_run
from flexmoe_jax.artifacts.model_checks import verify_model
from flexmoe_jax.artifacts.package import verify_package
from flexmoe_jax.artifacts.signature import Trust
from flexmoe_jax.compose.certificate import verify_certificate
from flexmoe_jax.errors import ArtifactError, Check


def verify(
    path: pathlib.Path | str,
    *,
    quick: bool = False,
    trust: Trust | None = None,
    certificate: pathlib.Path | str | None = None,
) -> list[Check]:
    """Checks of every file and tensor of the package, model or run directory at `path`; damage is never raised.

    `quick` reads names, sizes and headers, not contents. `trust` holds the keys that signatures are checked against
    (`artifacts.signature.read_trusted`). A model is also checked against an opt-out `certificate`. ArtifactError if
    `path` is not a directory, or a certificate is given for anything but a model.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", "give a package, a model or a run directory")
    if (path / "model.json").exists():
        checks = verify_model(path, quick=quick, trust=trust)
        return checks if certificate is None else checks + verify_certificate(certificate, path)
    if certificate is not None:
        what = f"{path} is not a model directory"
        raise ArtifactError(what, "give the directory of the model that the certificate is about")
    if (path / "checkpoints").is_dir():
        return verify_run(path, quick=quick)
    return verify_package(path, quick=quick, trust=trust)
