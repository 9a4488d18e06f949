"""Packages: one owner's parameters as a directory, the unit that travels between organisations.

    news/
      manifest.json   what it is and every digest (sealed, see digest.py)
      arrays/         a complete Orbax checkpoint of this owner's subtree and nothing else
      card.md         for people
      signature.json  the owner's, over the manifest (signature.py), or none

Arrays are stored uncompressed, one file per tensor, so a tensor's sha256 is the sha256 of its file: whoever hashes the
files has hashed the tensors, and Orbax is not needed to read them. Nothing depends on time or place: the same
parameters and records give the same bytes.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flexmoe_jax import config as configs
from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.arrays import (
    ITEM_BYTES,
    METADATA_FILE,
    header_file,
    header_problem,
    load_array,
    map_array,
    metadata_problem,
    not_finite,
    save_arrays,
    tensor_file,
)
from flexmoe_jax.artifacts.manifest import (
    FETCH_AGAIN,
    FORMAT,
    Manifest,
    TensorRecord,
    check_base,
    check_owner,
    check_shapes,
    read_manifest,
)
from flexmoe_jax.artifacts.record import Record, make_record
from flexmoe_jax.artifacts.sealed import read_bytes, sha256_array, write_sealed
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.artifacts.signature import Trust, check_signature
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError
from flexmoe_jax.files import copy_file, digest_files, list_files, new_directory, sha256_file
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import Params, flatten, unflatten


def write_package(
    path: pathlib.Path | str,
    *,
    owner: str,
    params: Params,
    config: ModelConfig,
    base: Mapping[str, str],
    record: Mapping[str, Any],
) -> str:
    """Writes the package of `owner` at the new directory `path`; returns the manifest digest.

    `params` is the owner's subtree (numpy or JAX arrays of float32, bfloat16 or float16, shapes of `owner_leaves`).
    `base` are content digests of what it belongs to: `tokenizer`, and for a data owner's expert `trunk` and `public`.
    `record` is any JSON (training, router, licence, contact). Raises ArtifactError for an existing path and for
    parameters that are missing, too many, of another shape or dtype, or not finite.
    """
    arrays = _check_params(owner, params, config)
    check_base(owner, base)
    made = make_record(record, owner)
    tensors = _tensor_records(arrays)
    with new_directory(pathlib.Path(path)) as folder:
        save_arrays(folder / "arrays", arrays)
        table = _to_json(tensors)
        (folder / "card.md").write_text(_card(owner, tensors, base, made))
        fields = {
            "format": FORMAT,
            "owner": owner,
            "config": configs.to_mapping(config),
            "config_digest": sealed.digest(config),
            "tensors": table,
            "files": digest_files(folder),
            "content": sealed.digest(table),
            "base": dict(base),
            "record": made.fields,
        }
        digest = write_sealed(folder / "manifest.json", fields)
        read_manifest(folder, owner)
    return digest


def content_digest(params: Params) -> str:
    """The identity of an owner's parameters: `content` of the manifest that `write_package` gives them."""
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    return sealed.digest(_to_json(_tensor_records(arrays)))


def load_package(
    path: pathlib.Path | str, *, verify: bool = True, digest: str | None = None, mapped: bool = False
) -> Params:
    """The owner's subtree as numpy arrays, bit for bit what was written.

    File names, kinds and sizes and array headers are checked before anything is allocated, and the very bytes that are
    returned against their sha256; `verify=False` leaves out the sha256. `digest` is the manifest's, where
    another package in its place will not do. `mapped` arrays are files mapped into memory, checked once before they are
    given out: for many processes that each read a part. Raises ArtifactError naming what is wrong.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    if digest not in (None, manifest.digest):
        raise ArtifactError(f"{path} has the manifest digest {manifest.digest}, not {digest}", "open the model again")
    raise_problems(path, check_files(path, manifest))
    if mapped:
        raise_problems(path, verify_package(path, manifest.owner, quick=not verify))
        return unflatten({name: map_array(path, name, t.shape, t.dtype) for name, t in manifest.tensors.items()})
    arrays = {name: load_array(path, name, t.shape, t.dtype) for name, t in manifest.tensors.items()}
    if verify:
        files = {tensor_file(name, array.shape): array for name, array in arrays.items()}
        found = {n: sha256_array(files[n]) if n in files else sha256_file(path / n) for n in manifest.files}
        raise_problems(path, [_compare(n, found[n], file.sha256) for n, file in manifest.files.items()])
        _raise_not_finite(manifest.owner, arrays)
    return unflatten(arrays)


def verify_package(
    path: pathlib.Path | str, owner: str | None = None, *, quick: bool = False, trust: Trust | None = None
) -> list[Check]:
    """One check for the manifest, the signature, every file and every tensor; damage is reported, never raised.

    `quick` reads the manifest and the headers of arrays alone: names, kinds and sizes, no contents. `trust` are the
    keys by which a signature must be; without it, one that is there must be valid.
    """
    path = pathlib.Path(path)
    try:
        manifest = read_manifest(path, owner)
    except FlexMoEError as error:
        return [Check("manifest.json", False, error.what)]
    first = [Check("manifest.json", True, manifest.digest)]
    try:
        line = check_signature(path, manifest.owner, manifest.digest, trust)
        first += [Check(SIGNATURE, True, line)] if line else []
    except ArtifactError as error:
        first.append(Check(SIGNATURE, False, error.what))
    checks = check_files(path, manifest)
    if quick or not all(f.ok for f in checks):
        return [*first, *checks]
    tensors = {tensor_file(name, t.shape): (name, t) for name, t in manifest.tensors.items()}
    bad: dict[str, int] = dict.fromkeys(manifest.tensors, 0)
    checks = []
    for file, record in manifest.files.items():
        name, tensor = tensors.get(file, ("", None))

        def count(chunk, name=name, tensor=tensor):
            if tensor is not None:
                bad[name] += not_finite(chunk, tensor.dtype)

        checks.append(_compare(file, _hash(path / file, count), record.sha256))
    if all(f.ok for f in checks):  # else the files say it already: a tensor's bytes are its file's
        for name, t in manifest.tensors.items():
            wrong = f": {bad[name]} values are not finite" if bad[name] else ""
            checks.append(Check(name, not wrong, f"{t.dtype}{list(t.shape)} {t.sha256}{wrong}"))
    return [*first, *checks]


def check_files(path: pathlib.Path, manifest: Manifest) -> list[Check]:
    """Checks of a package's files without reading them: none missing, none more, kinds, sizes, array headers."""
    found, others = list_files(path)
    for name in ("manifest.json", SIGNATURE):  # have digests of their own
        found.pop(name, None)
    checks = [Check(name, False, "a link, an empty directory or a special file") for name in others]
    checks += [Check(n, False, "the manifest does not name this file") for n in sorted({*found} - {*manifest.files})]
    for name, file in manifest.files.items():
        if name not in found:
            checks.append(Check(name, False, "missing"))
        elif found[name] != file.size:
            checks.append(Check(name, False, f"has {found[name]} bytes, the manifest says {file.size}"))
        elif _is_sparse(path / name):
            checks.append(Check(name, False, f"has {file.size} bytes of which next to nothing is on the disk"))
        else:
            checks.append(Check(name, True, f"{file.size} bytes"))
    if all(f.ok for f in checks):
        headers = {header_file(n): header_problem(path, n, t.shape, t.dtype) for n, t in manifest.tensors.items()}
        headers[METADATA_FILE] = metadata_problem(path)
        checks += [Check(name, False, problem) for name, problem in headers.items() if problem]
    return checks


def check_own_files(path: pathlib.Path) -> None:
    """Refuses a package whose files have other names elsewhere: whoever holds those can change it under our hands."""
    shared = [name for name in list_files(path)[0] if (path / name).lstat().st_nlink > 1]
    if shared:
        raise ArtifactError(
            f"{path} holds hard links: {', '.join(shared)}",
            "copy the package (cp -r), or merge with links (--link) if you made them yourself",
        )


def copy_package(source: pathlib.Path, target: pathlib.Path, manifest: Manifest, link: bool = False) -> None:
    """Copies (or hard-links) a package file by file into the new directory `target`, checking every byte on the way."""
    raise_problems(source, check_files(source, manifest))
    checks = {
        tensor_file(name, t.shape): functools.partial(_check_chunk, source, name, t.dtype)
        for name, t in manifest.tensors.items()
    }
    for name, file in manifest.files.items():
        copy_file(source / name, target / name, file.sha256, link, checks.get(name, lambda chunk: None))
    check_signature(source, manifest.owner, manifest.digest)
    for name in ("manifest.json", SIGNATURE):
        if name == "manifest.json" or os.path.lexists(source / name):
            (target / name).write_bytes(read_bytes(source / name))
    if read_manifest(target, manifest.owner).digest != manifest.digest:
        raise ArtifactError(f"{source} changed while it was copied", "try again when nothing writes to it")


def raise_problems(path: pathlib.Path, checks: list[Check]) -> None:
    """An ArtifactError that names every check that is not ok, if there is one."""
    problems = [f"{f.subject}: {f.detail}" for f in checks if not f.ok]
    if problems:
        raise ArtifactError(f"{path} is damaged:\n    " + "\n    ".join(problems), FETCH_AGAIN)


def _check_params(owner: str, params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    check_owner(owner)
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    check_shapes(owner, {path: a.shape for path, a in arrays.items()}, config)
    for path, array in arrays.items():
        if array.dtype.name not in ITEM_BYTES or array.dtype.byteorder == ">":
            raise ArtifactError(
                f"the parameter {path!r} of {owner!r} has dtype {array.dtype}", f"use one of: {', '.join(ITEM_BYTES)}"
            )
    _raise_not_finite(owner, arrays)
    return arrays


def _raise_not_finite(owner: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An ArtifactError if an array holds NaN or an infinity."""
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise ArtifactError(
                f"the parameter {path!r} of {owner!r} has {count} values that are not finite", "retrain it"
            )


def _tensor_records(arrays: Mapping[str, np.ndarray]) -> dict[str, TensorRecord]:
    return {path: TensorRecord(a.shape, a.dtype.name, sha256_array(a)) for path, a in arrays.items()}


def _to_json(tensors: Mapping[str, TensorRecord]) -> dict:
    return {path: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256} for path, t in tensors.items()}


def _hash(path: pathlib.Path, *consumers) -> str:
    try:
        return sha256_file(path, *consumers)
    except OSError as error:
        return f"none, it cannot be read ({error.strerror})"


def _compare(name: str, found: str, expected: str) -> Check:
    ok = found == expected
    return Check(name, ok, expected if ok else f"has sha256 {found}, the manifest says {expected}")


def _check_chunk(source: pathlib.Path, name: str, dtype: str, chunk: bytes) -> None:
    if bad := not_finite(chunk, dtype):
        raise ArtifactError(
            f"{source}: the tensor {name!r} holds {bad} or more values that are not finite", FETCH_AGAIN
        )


def _is_sparse(path: pathlib.Path) -> bool:
    """Whether a file of over 64 MiB has far fewer blocks than bytes: it costs its sender nothing, its reader hours."""
    status = path.lstat()
    return status.st_size > 64 << 20 and status.st_blocks * 512 * 16 < status.st_size


def _card(owner: str, tensors: Mapping[str, TensorRecord], base: Mapping[str, str], record: Record) -> str:
    count = sum(math.prod(t.shape) for t in tensors.values())
    rows = [f"| `{path}` | {list(t.shape)} | {t.dtype} |" for path, t in tensors.items()]
    lines = [
        f"# {owner}",
        "",
        f"The `{owner}` part of a FlexMoE model: {count:,} parameters in {len(tensors)} tensors.",
        "`flexmoe verify` checks every byte of this directory against `manifest.json`.",
        "",
        f"- licence: {record.licence or 'not stated'}",
        f"- contact: {record.contact or 'not stated'}",
        *(f"- made for {name} {digest}" for name, digest in sorted(base.items())),
        "",
        "| tensor | shape | dtype |",
        "|---|---|---|",
        *rows,
        "",
        "Records of its training:",
        "",
        "```json",
        json.dumps(record.fields, indent=2, sort_keys=True, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"
