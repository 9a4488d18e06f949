"""Opting out and replacing: one expert's directory and `model.json` change, nothing else does.

In place, `model.json` is the switch: it is replaced atomically, so a reader sees the model before or after the change.
A crash leaves a model that opens, and `verify_model` names what is left over; the same call made again finishes.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any

from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.manifest import Manifest, read_manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, changing, open_model, staging_place, write_model_json
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
    """The expert `name` that leaves `model`, and what is left without it."""

    model: ModelDir
    name: ExpertName

    @property
    def rest(self) -> dict[str, tuple[pathlib.Path, Manifest]]:
        """The packages that stay."""
        names = (name for name in self.model.experts if name != self.name)
        return {name: (self.model.package(name), self.model.manifests[name]) for name in names}

    @property
    def top_k(self) -> int | None:
        """The wanted number of active experts, at most as many as are left."""
        wanted = self.model.wanted_top_k
        return None if wanted is None else min(wanted, len(self.model.experts) - 1)

    @property
    def details(self) -> dict[str, Any]:
        """What the journal tells about it."""
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
    """Removes the expert `name`, in place or into the new directory `out` (which leaves `model` as it is).

    The result is, byte for byte outside the journal, what `merge` makes of the other experts with the same top-k, or
    with as many as are left where top-k was more. In place, the expert's bytes leave the directory. A `certificate`
    is written to that new file when the expert is gone (certificate.py). Raises ArtifactError for `public` and `trunk`,
    FlexMoEError for unknown names.
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
    """Puts `package` in the place of the expert of the same name, in place, after the checks that `merge` makes.

    The result is, byte for byte outside the journal, what `merge` makes of the new package and the other experts. In
    the place of a signed package goes only one of a higher version, signed with the same key or one in `trust`.
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
            # Readers look for the digest they want in its staging place first, so that every state between opens.
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
    """Refuses an older version, no signature, or another's in the place of a signed package."""
    if not (place / SIGNATURE).exists():
        return
    before = read_signature(place, old)
    if not (package / SIGNATURE).exists():
        raise ArtifactError(
            f"{package} is not signed, the package in its place is version {before.version}", "ask for the signed one"
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
            "give the owner's trusted keys (--trusted) if the key was changed",
        )


def _departure(model: ModelDir, name: str) -> Departure:
    check_known([name], model.experts)
    return Departure(model, expert_name(name))


def _erase_in_place(leaving: Departure) -> ModelDir:
    """The order is the crash's: a reader never sees a model that names a package which is not there."""
    path = leaving.model.path
    write_model_json(path, tuple(leaving.rest), leaving.top_k, leaving.model.manifests)
    _erase(path, leaving.name, leaving.model.manifests[leaving.name].digest)
    made = open_model(path)
    append_entry(path, "opted_out", made.expert_digests, made.digest, **leaving.details)
    return made


def _finish_interrupted(path: pathlib.Path) -> list[ExpertName]:
    """Ends opt-outs that were interrupted after model.json was written: erases, records; returns their names.

    Only a package that the journal's last line names with its manifest digest is erased.
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
    """Deletes the package `name`, whose manifest has this digest, and what a replacement left of it.

    It first moves to its staging place, whose name holds the digest: a crash never leaves half a package by its name.
    """
    if os.path.lexists(path / name):
        found = read_manifest(path / name, name).digest
        if found != digest:
            raise ArtifactError(
                f"{path / name} has the manifest digest {found}, the journal names {digest}",
                "it is not what left this model: move it away, then run the command again",
            )
        remove_directory(staging_place(path, name, digest))
        os.rename(path / name, staging_place(path, name, digest))
        sync_directory(path)
    _remove_hidden(path, name)


def _settle(model: ModelDir, name: str) -> None:
    """Moves the package of `name` to its place if it is staged, and removes what else is staged for it."""
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
