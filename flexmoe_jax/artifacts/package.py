"""Packages: one owner's parameters as a directory, the unit that travels between organisations.

    news/
      manifest.json   what it is and every digest (sealed, see digest.py)
      arrays/         a complete Orbax checkpoint of this owner's subtree and nothing else
      card.md         for people

Arrays are stored uncompressed, one file per tensor, so a tensor's sha256 is the sha256 of its file: whoever hashes the files
has hashed the tensors. Nothing depends on time or place: the same parameters and records give the same bytes.
"""

import dataclasses
import json
import math
import os
import pathlib
import posixpath
from collections.abc import Mapping
from typing import Any

import numpy as np

from flexmoe_jax import config as configs
from flexmoe_jax.artifacts.digest import (
    check_fields,
    check_format,
    digest_files,
    is_sha256,
    list_files,
    parse_json,
    read_bytes,
    read_sealed,
    sha256_array,
    sha256_file,
    write_sealed,
)
from flexmoe_jax.artifacts.files import copy_file, new_directory
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.model.spec import owner_spec
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, check_owner_name, flatten, unflatten

FORMAT = "flexmoe-package-1"
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16"}
FETCH_AGAIN = "fetch the package again from its owner"


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One tensor; `sha256` is over its little-endian C-order bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One file of the package."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a package says about itself, checked against itself.

    `content` is the digest of the tensor table: the identity of the owner's parameters, which other packages refer to in
    `base`. `digest` is the manifest's own: it covers everything, and models refer to packages by it.
    """

    owner: str
    config: ModelConfig
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    content: str
    base: dict[str, str]
    record: dict[str, Any]
    digest: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of a verification report."""

    subject: str
    ok: bool
    detail: str


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

    `params` is the owner's subtree (numpy or JAX arrays, float32 or bfloat16, shapes of `owner_spec`). `base` are content
    digests of what it belongs to: `tokenizer`, and for a data owner's expert `trunk` and `public`. `record` is any JSON
    (training, router, licence, contact). Raises ArtifactError for an existing path and for parameters that are missing, too
    many, of another shape or dtype, or not finite.
    """
    arrays = _check_params(owner, params, config)
    tensors = {path: TensorRecord(a.shape, a.dtype.name, sha256_array(a)) for path, a in arrays.items()}
    with new_directory(pathlib.Path(path)) as folder:
        _save_arrays(folder / "arrays", unflatten(arrays))
        table = _to_json(tensors)
        (folder / "card.md").write_text(_card(owner, tensors, base, record))
        fields = {
            "format": FORMAT,
            "owner": owner,
            "config": configs.to_mapping(config),
            "config_digest": configs.digest(config),
            "tensors": table,
            "files": digest_files(folder),
            "content": configs.digest(table),
            "base": dict(base),
            "record": _plain_record(owner, record),
        }
        digest = write_sealed(folder / "manifest.json", fields)
        read_manifest(folder, owner)
    return digest


def read_manifest(path: pathlib.Path | str, owner: str | None = None) -> Manifest:
    """The manifest of the package at `path`, which must be that of `owner` if given; arrays are not touched.

    Raises ArtifactError for anything altered, unknown or contradictory.
    """
    where = pathlib.Path(path) / "manifest.json"
    fields = read_sealed(where)
    check_format(fields, FORMAT, where)
    names = ("config", "tensors", "files", "base", "record")
    texts = ("format", "owner", "config_digest", "content", "digest")
    check_fields(fields, dict.fromkeys(names, dict) | dict.fromkeys(texts, str), where)
    if owner is not None and fields["owner"] != owner:
        raise ArtifactError(f"{path} is the package of {fields['owner']!r}, not of {owner!r}", "give the right directory")
    _check_owner(fields["owner"])
    _check_base(fields["owner"], fields["base"])
    config = configs.from_mapping(ModelConfig, fields["config"], f"{where}: config")
    tensors = {name: _read_tensor(name, value, where) for name, value in fields["tensors"].items()}
    files = {name: _read_file(name, value, where) for name, value in fields["files"].items()}
    for name, value in (("config_digest", configs.digest(config)), ("content", configs.digest(fields["tensors"]))):
        if fields[name] != value:
            raise ArtifactError(f"{where}: {name} is {fields[name]}, what it states has {value}", FETCH_AGAIN)
    _check_shapes(fields["owner"], {name: t.shape for name, t in tensors.items()}, config)
    for name, tensor in tensors.items():
        file = FileRecord(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype], tensor.sha256)
        if files.get(_tensor_file(name, tensor)) != file or _header_file(name) not in files:
            raise ArtifactError(f"{where}: the tensor {name!r} and its files disagree", FETCH_AGAIN)
    return Manifest(
        fields["owner"],
        config,
        tensors,
        files,
        **{name: fields[name] for name in ("content", "base", "record", "digest")},
    )


def load_package(path: pathlib.Path | str, *, verify: bool = True) -> Params:
    """The owner's subtree as numpy arrays, bit for bit what was written.

    File names, kinds and sizes and array headers are checked before Orbax opens anything; `verify=False` leaves out the
    sha256 of files and tensors. Raises ArtifactError naming what is wrong.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    raise_problems(path, check_files(path, manifest, hashes=verify))
    arrays = _load_arrays(path / "arrays", manifest)
    if verify:
        raise_problems(path, _check_tensors(arrays, manifest))
    return unflatten(arrays)


def verify_package(path: pathlib.Path | str, owner: str | None = None) -> list[Finding]:
    """One finding for the manifest, every file and every tensor; damage is reported, never raised."""
    path = pathlib.Path(path)
    try:
        manifest = read_manifest(path, owner)
    except FlexMoEError as error:
        return [Finding("manifest.json", False, error.what)]
    findings = [Finding("manifest.json", True, manifest.digest), *check_files(path, manifest)]
    if all(f.ok for f in findings):
        try:
            findings += _check_tensors(_load_arrays(path / "arrays", manifest), manifest)
        except ArtifactError as error:
            findings.append(Finding("arrays", False, error.what))
    return findings


def check_files(path: pathlib.Path, manifest: Manifest, hashes: bool = True) -> list[Finding]:
    """Findings on the files of the package at `path`: none missing, none more, sizes, sha256 if `hashes`, array headers."""
    found, others = list_files(path)
    found.pop("manifest.json", None)
    findings = [Finding(name, False, "a link, an empty directory or a special file") for name in others]
    findings += [Finding(n, False, "the manifest does not name this file") for n in sorted({*found} - {*manifest.files})]
    for name, file in manifest.files.items():
        if name not in found:
            findings.append(Finding(name, False, "missing"))
        elif found[name] != file.size:
            findings.append(Finding(name, False, f"has {found[name]} bytes, the manifest says {file.size}"))
        else:
            sha256 = sha256_file(path / name) if hashes else file.sha256
            detail = sha256 if sha256 == file.sha256 else f"has sha256 {sha256}, the manifest says {file.sha256}"
            findings.append(Finding(name, sha256 == file.sha256, detail))
    if all(f.ok for f in findings):
        findings += [f for name, t in manifest.tensors.items() for f in _check_header(path, name, t)]
    return findings


def copy_package(source: pathlib.Path, target: pathlib.Path, manifest: Manifest, link: bool = False) -> None:
    """Copies (or hard-links) a package file by file into the new directory `target`, checking every byte on the way."""
    raise_problems(source, check_files(source, manifest, hashes=False))
    for name, file in manifest.files.items():
        copy_file(source / name, target / name, file.sha256, link)
    (target / "manifest.json").write_bytes(read_bytes(source / "manifest.json"))
    if read_manifest(target, manifest.owner).digest != manifest.digest:
        raise ArtifactError(f"{source} changed while it was copied", "try again when nothing writes to it")


def raise_problems(path: pathlib.Path, findings: list[Finding]) -> None:
    """An ArtifactError that names every finding that is not ok, if there is one."""
    problems = [f"{f.subject}: {f.detail}" for f in findings if not f.ok]
    if problems:
        raise ArtifactError(f"{path} is damaged:\n    " + "\n    ".join(problems), FETCH_AGAIN)


def _check_owner(owner: str) -> None:
    if owner not in (TRUNK, PUBLIC):
        check_owner_name(owner)


def _check_base(owner: str, base: Mapping[str, str]) -> None:
    expected = {"tokenizer"} if owner in (TRUNK, PUBLIC) else {TRUNK, PUBLIC, "tokenizer"}
    if set(base) != expected or not all(is_sha256(value) for value in base.values()):
        raise ArtifactError(
            f"the base of {owner!r} is {dict(base)}", f"give the sha256 of: {', '.join(sorted(expected))}"
        )


def _check_params(owner: str, params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    _check_owner(owner)
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    _check_shapes(owner, {path: a.shape for path, a in arrays.items()}, config)
    for path, array in arrays.items():
        if array.dtype.name not in ITEM_BYTES or array.dtype.byteorder == ">":
            raise ArtifactError(
                f"the parameter {path!r} of {owner!r} has dtype {array.dtype}", f"use one of: {', '.join(ITEM_BYTES)}"
            )
    raise_not_finite(owner, arrays)
    return arrays


def raise_not_finite(owner: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An ArtifactError if an array holds NaN or an infinity."""
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise ArtifactError(f"the parameter {path!r} of {owner!r} has {count} values that are not finite", "retrain it")


def _check_shapes(owner: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    spec = owner_spec(config, owner)
    for path in sorted({*spec, *shapes}):
        if path not in shapes or path not in spec:
            problem = "is missing" if path in spec else "does not belong there"
            raise ArtifactError(f"{owner!r}: the parameter {path!r} {problem}", f"give exactly: {', '.join(spec)}")
        if tuple(shapes[path]) != spec[path].shape:
            raise ArtifactError(
                f"{owner!r}: the parameter {path!r} has shape {tuple(shapes[path])}, the configuration wants "
                f"{spec[path].shape}",
                "give the parameters and the configuration of the same model",
            )


def _read_tensor(name: str, value, where) -> TensorRecord:
    where = f"{where}: tensor {name!r}"
    check_fields(_object(value, where), {"shape": list, "dtype": str, "sha256": str}, where)
    shape_ok = all(type(size) is int and size > 0 for size in value["shape"])
    if not shape_ok or value["dtype"] not in ITEM_BYTES or not is_sha256(value["sha256"]):
        raise ArtifactError(f"{where} is {value}", FETCH_AGAIN)
    return TensorRecord(tuple(value["shape"]), value["dtype"], value["sha256"])


def _read_file(name: str, value, where) -> FileRecord:
    where = f"{where}: file {name!r}"
    check_fields(_object(value, where), {"size": int, "sha256": str}, where)
    outside = posixpath.isabs(name) or ".." in name.split("/") or posixpath.normpath(name) != name or "\\" in name
    if outside or not (name == "card.md" or name.startswith("arrays/")) or "\0" in name:
        raise ArtifactError(f"{where} is no path a package may hold", "do not use this package")
    if value["size"] < 0 or not is_sha256(value["sha256"]):
        raise ArtifactError(f"{where} is {value}", FETCH_AGAIN)
    return FileRecord(value["size"], value["sha256"])


def _object(value, where) -> dict:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is {value!r}, not an object", FETCH_AGAIN)
    return value


def _plain_record(owner: str, record: Mapping[str, Any]) -> dict:
    try:
        return json.loads(configs.canonical_json(dict(record)))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the record of {owner!r} is not JSON: {error}", "give plain JSON values") from error


def _to_json(tensors: Mapping[str, TensorRecord]) -> dict:
    return {path: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256} for path, t in tensors.items()}
