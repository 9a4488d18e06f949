"""Opting out and replacing: one expert's directory and `model.json` change, nothing else does (method: section 2.3).

In place, `model.json` is the switch: it is replaced atomically, so whoever opens the model sees it before or after. A
crash leaves a model that opens, and `verify_model` names what is left over; the same call made again finishes.
"""

import os
import pathlib
import re

from flexmoe_jax.artifacts.journal import append_entry, read_journal
from flexmoe_jax.artifacts.manifest import read_manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, changing, open_model, staging_place, write_model_json
from flexmoe_jax.artifacts.package import copy_package
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.artifacts.signature import Trust, read_signature
from flexmoe_jax.compose.certificate import certify, publish, write_pending
from flexmoe_jax.compose.merge import read_expert
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, remove_directory, sync_directory
from flexmoe_jax.tree import PUBLIC, TRUNK, ExpertName, check_known, expert_name


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
    is written to that new file when the expert is gone (certificate.py). Raises for `public`, `trunk` and unknown
    names.
    """
    path, proof = pathlib.Path(model), None if certificate is None else pathlib.Path(certificate)
    if name in (PUBLIC, TRUNK):
        raise ArtifactError(
            f"{name!r} cannot opt out: every expert was trained beside it", "name a data owner's expert"
        )
    if out is not None:
        opened = open_model(path)
        check_known([name], opened.experts)
        rest = {n: (opened.package(n), opened.manifests[n]) for n in opened.experts if n != name}
        details = _details(opened, name)
        if proof is not None:
            write_pending(proof, certify(opened, name, details["top_k"]), pathlib.Path(out))
        made = assemble(out, opened, rest, details["top_k"], "opted_out", details)
        return _publish(proof, name, made)
    with changing(path):
        finished = _finish_opt_outs(path)
        opened = open_model(path)
        if name not in opened.experts:
            if proof is not None and publish(proof, name, opened):  # only this was left to do
                return opened
            if name in finished:
                return _publish(proof, name, opened)
        check_known([name], opened.experts)
        details, rest_names = _details(opened, name), tuple(n for n in opened.experts if n != name)
        if proof is not None:
            write_pending(proof, certify(opened, name, details["top_k"]), path)
        write_model_json(path, rest_names, details["top_k"], opened.manifests)
        _erase(path, expert_name(name), opened.manifests[name].digest)
        made = open_model(path)
        append_entry(path, "opted_out", made.expert_digests, made.digest, **details)
        return _publish(proof, name, made)


def replace(model: pathlib.Path | str, package: pathlib.Path | str, *, trust: Trust | None = None) -> ModelDir:
    """Puts `package` in the place of the expert of the same name, in place, after the checks that `merge` makes.

    The result is, byte for byte outside the journal, what `merge` makes of the new package and the other experts. In
    the place of a signed package goes only one of a higher version, signed with the same key or one in `trust`.
    """
    path, package = pathlib.Path(model), pathlib.Path(package)
    with changing(path):
        _finish_opt_outs(path)
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


def _publish(proof: pathlib.Path | None, name: str, model: ModelDir) -> ModelDir:
    if proof is not None and not publish(proof, name, model):
        raise ArtifactError(
            f"{name!r} left {model.path} without a certificate, and cannot have one now that its bytes are gone",
            "the journal records what was removed: flexmoe inspect --journal",
        )
    return model


def _finish_opt_outs(path: pathlib.Path) -> list[ExpertName]:
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


def _details(model: ModelDir, name: str) -> dict:
    """What the journal tells about the removal of `name`; `top_k` is the wanted one, clamped to the experts left."""
    left = len(model.experts) - 1
    top_k = None if model.wanted_top_k is None else min(model.wanted_top_k, left)
    return {
        "expert": name,
        "content": model.manifests[name].content,
        "top_k": top_k,
        "top_k_before": model.wanted_top_k,
    }


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
