"""Opting out and replacing: only one expert's directory and `model.json` change.

In place, `model.json` is replaced atomically, so that a reader sees the model before or after the change. A crash
leaves a model that opens; `verify_model` names the remains, and the same call completes the change.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any

from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.manifest import Manifest, read_manifest
from flexmoe_jax.artifacts.model_changes import changing
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, open_model, staging_place, write_model_json
from flexmoe_jax.artifacts.package import copy_package
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.artifacts.signature import Trust, read_signature
from flexmoe_jax.compose.certificate import certified, publish_pending
from flexmoe_jax.compose.merge import read_expert
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, remove_directory, sync_directory
from flexmoe_jax.tree import PUBLIC, TRUNK, ExpertName, check_known, expert_name


@dataclasses.dataclass(frozen=True)
class Departure:
    """The expert `name` that leaves `model`, and the model without it."""

    model: ModelDir
    name: ExpertName

    @property
    def rest(self) -> dict[str, tuple[pathlib.Path, Manifest]]:
        """{name: package} of the experts that stay."""
        names = (name for name in self.model.experts if name != self.name)
        return {name: (self.model.package(name), self.model.manifests[name]) for name in names}

    @property
    def top_k(self) -> int | None:
        """The wanted number of active experts (None: all), at most the number of those that stay."""
        wanted = self.model.wanted_top_k
        return None if wanted is None else min(wanted, len(self.model.experts) - 1)

    @property
    def details(self) -> dict[str, Any]:
        """The details of the event in the journal."""
        content = self.model.manifests[self.name].content
        before = self.model.wanted_top_k
        return {"expert": self.name, "content": content, "top_k": self.top_k, "top_k_before": before}


def opt_out(
    model: pathlib.Path | str,
    name: str,
    out: pathlib.Path | str | None = None,
    *,
    certificate: pathlib.Path | str | None = None,
) -> ModelDir:
    """Removes the expert `name`, in place or by writing the new directory `out`, which does not change `model`.

    Except for the journal, the result is byte-identical to `merge` of the other experts with the same top-k, at most
    their number. In place, the expert's bytes are deleted. The new file `certificate` is written when the expert is
    gone (certificate.py). A call that was interrupted is completed by the same call. ArtifactError for `public` and
    `trunk`, a damaged model, and one that another process changes; FlexMoEError for unknown names.
    """
    path, proof = pathlib.Path(model), None if certificate is None else pathlib.Path(certificate)
    if name in (PUBLIC, TRUNK):
        remedy = "name a data owner's expert"
        raise ArtifactError(f"{name!r} cannot opt out: every expert was trained beside it", remedy)
    if out is not None:
        leaving = _departure(open_model(path), name)
        with certified(leaving.model, leaving.name, leaving.top_k, proof, pathlib.Path(out)):
            return assemble(out, leaving.model, leaving.rest, leaving.top_k, "opted_out", leaving.details)
    with changing(path):
        finished = _finish_interrupted(path)
        opened = open_model(path)
        if name not in opened.experts and publish_pending(proof, name, opened, must=name in finished):
            return opened
        leaving = _departure(opened, name)
        with certified(opened, leaving.name, leaving.top_k, proof, path):
            return _erase_in_place(leaving)


def replace(model: pathlib.Path | str, package: pathlib.Path | str, *, trust: Trust | None = None) -> ModelDir:
    """Replaces the expert of the same name by `package`, in place, after the checks of `merge`.

    Except for the journal, the result is byte-identical to `merge` of the new package and the other experts. A signed
    package is replaced only by one of a higher version, signed with the same key or, with `trust`, with a trusted key.
    An interrupted call is completed by the same call. ArtifactError for a package that may not take this place,
    FlexMoEError if the model has no expert of this name.
    """
    path, package = pathlib.Path(model), pathlib.Path(package)
    with changing(path):
        _finish_interrupted(path)
        opened = open_model(path)
        new = read_expert(package, opened, trust=trust)
        name = new.owner
        check_known([name], opened.experts)
        old = opened.manifests[name]
        place, parked, staged = (
            path / name,
            staging_place(path, name, old.digest),
            staging_place(path, name, new.digest),
        )
        _settle(opened, name)
        if new.digest != old.digest:
            _check_newer(place, old.digest, package, new.digest, trust)
            with new_directory(staged) as folder:
                copy_package(package, folder, new)
            # Readers look for a digest in its staging place first, so that the model opens in every state between.
            os.rename(place, parked)
            sync_directory(path)
            manifests = {**opened.manifests, name: new}
            write_model_json(path, opened.experts, opened.wanted_top_k, manifests)
            _settle(open_model(path), name)
        made = open_model(path)
        if read_journal(path)[-1].model != made.digest:
            append_entry(path, "replaced", made.expert_digests, made.digest, expert=name, content=new.content)
        return made


def _check_newer(place: pathlib.Path, old: str, package: pathlib.Path, new: str, trust: Trust | None) -> None:
    """ArtifactError if a signed package would be replaced by an older, unsigned, or differently signed one."""
    if not (place / SIGNATURE).exists():
        return
    before = read_signature(place, old)
    if not (package / SIGNATURE).exists():
        raise ArtifactError(
            f"{package} is not signed, the package in its place is version {before.version}",
            "ask the owner for the signed package",
        )
    after = read_signature(package, new)
    if after.version <= before.version:
        raise ArtifactError(
            f"{package} is version {after.version}, the package in its place is version {before.version}",
            "replace a version by a higher one",
        )
    if trust is None and after.public_key != before.public_key:
        raise ArtifactError(
            f"{package} is signed with {after.public_key}, the package in its place with {before.public_key}",
            "give the owner's trusted keys (--trusted) if the owner changed the key",
        )


def _departure(model: ModelDir, name: str) -> Departure:
    check_known([name], model.experts)
    return Departure(model, expert_name(name))


def _erase_in_place(leaving: Departure) -> ModelDir:
    """model.json first, then the package, then the journal: at any crash the model names only packages that exist."""
    path = leaving.model.path
    write_model_json(path, tuple(leaving.rest), leaving.top_k, leaving.model.manifests)
    _erase(path, leaving.name, leaving.model.manifests[leaving.name].digest)
    made = open_model(path)
    append_entry(path, "opted_out", made.expert_digests, made.digest, **leaving.details)
    return made


def _finish_interrupted(path: pathlib.Path) -> list[ExpertName]:
    """Completes opt-outs that were interrupted after model.json was written; returns the names of the experts.

    Erases only packages that the journal's last line names with their manifest digests.
    """
    model = open_model(path)
    last = read_journal(path)[-1]
    names = [n for n in last.experts if n not in model.experts]
    for name in names:
        _erase(path, name, last.manifests.get(name))
    if names:
        append_entry(path, "opted_out", model.expert_digests, model.digest, finished=names)
    return names


def _erase(path: pathlib.Path, name: ExpertName, digest: str | None) -> None:
    """Deletes the package `name`, whose manifest has this digest, and the remains of a replacement.

    The package first moves to its staging place, whose name holds the digest: a crash never leaves half a package under
    its name. ArtifactError if the package has another digest.
    """
    if os.path.lexists(path / name):
        found = read_manifest(path / name, name).digest
        if found != digest:
            raise ArtifactError(
                f"{path / name} has the manifest digest {found}, the journal names {digest}",
                "move it away, then run the command again: it is not the package that left this model",
            )
        remove_directory(staging_place(path, name, digest))
        os.rename(path / name, staging_place(path, name, digest))
        sync_directory(path)
    _remove_hidden(path, name)


def _settle(model: ModelDir, name: str) -> None:
    """Moves the package of `name` to its place if it is staged, and removes other staged packages of that name."""
    located = model.package(name)
    if located != model.path / name:
        os.rename(located, model.path / name)
        sync_directory(model.path)
    _remove_hidden(model.path, name)


def _remove_hidden(path: pathlib.Path, name: str) -> None:
    staging = re.compile(rf"\.{name}-[0-9a-f]{{12}}|\.\.{name}-[0-9a-f]{{12}}\.partial-[0-9a-f]{{8}}")
    for entry in sorted(path.iterdir()):
        if staging.fullmatch(entry.name):
            remove_directory(entry)
