"""Opting out and replacing: only one expert's directory and `model.json` change.

In place, `model.json` is replaced atomically, so that a reader sees the model before or after the change. A crash
leaves a model that opens; `verify_model` names the remains, and the same call completes the change.
"""

import dataclasses
import os
import pathlib
from typing import Any

from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.manifest import Manifest
from flexmoe_jax.artifacts.model_changes import changing, remove_leftovers, settle
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, open_model, staging_place, write_model_json
from flexmoe_jax.artifacts.package import copy_package
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.artifacts.signature import Trust, read_signature
from flexmoe_jax.compose.certificate import certified, publish_pending
from flexmoe_jax.compose.merge import read_expert
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import check_outside, new_directory, remove_directory, sync_directory
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
        check_outside(pathlib.Path(out), [path])
        with certified(leaving.model, leaving.name, leaving.top_k, proof, pathlib.Path(out)):
            return assemble(out, leaving.model, leaving.rest, leaving.top_k, "opted_out", leaving.details)
    with changing(path) as opened:
        finished = _finish_interrupted(opened)
        if name not in opened.experts:
            remove_leftovers(path)
            if publish_pending(proof, name, opened, must=name in finished):
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
    with changing(path) as opened:
        _finish_interrupted(opened)
        new = read_expert(package, opened, trust=trust)
        name = new.owner
        check_known([name], opened.experts)
        old = opened.manifests[name]
        place, parked, staged = path / name, *(staging_place(path, name, m.digest) for m in (old, new))
        if new.digest != old.digest:
            _check_newer(place, old.digest, package, new.digest, trust)
            remove_directory(staged)  # of an interrupted call
            with new_directory(staged) as folder:
                copy_package(package, folder, new)
            # Readers look for a digest in its staging place first, so that the model opens in every state between.
            os.rename(place, parked)
            sync_directory(path)
            manifests = {**opened.manifests, name: new}
            write_model_json(path, opened.experts, opened.wanted_top_k, manifests)
            settle(open_model(path))
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
    remove_leftovers(path)
    made = open_model(path)
    append_entry(path, "opted_out", made.expert_digests, made.digest, **leaving.details)
    return made


def _finish_interrupted(model: ModelDir) -> list[ExpertName]:
    """Completes opt-outs that were interrupted after model.json was written; returns the names of the experts.

    Erases the packages that the journal's last line names and model.json does not; `changing` has compared digests.
    """
    last = read_journal(model.path)[-1]
    names = [n for n in last.experts if n not in model.experts]
    for name in names:
        _erase(model.path, name, last.manifests.get(name, ""))
    if names:
        remove_leftovers(model.path)
        append_entry(model.path, "opted_out", model.expert_digests, model.digest, finished=names)
    return names


def _erase(path: pathlib.Path, name: ExpertName, digest: str) -> None:
    """Deletes the package `name`, which has this manifest digest.

    It first moves to its staging place, whose name holds the digest: a crash never leaves half a package under its
    name.
    """
    staged = staging_place(path, name, digest)
    if os.path.lexists(path / name):
        os.rename(path / name, staged)
        sync_directory(path)
    remove_directory(staged)
