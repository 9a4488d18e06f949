"""Packages: one owner's parameters as a directory, the unit that organizations exchange.

    news/
      manifest.json   description and all digests (sealed, see sealed.py)
      arrays/         a complete Orbax checkpoint of only this owner's subtree
      card.md         description for people
      signature.json  the owner's signature of the manifest (signature.py), optional

Arrays are stored uncompressed, one file per tensor, so that a tensor's sha256 is the sha256 of its file, and reading
them does not need Orbax. The bytes do not depend on time or place: the same parameters and record give the same bytes.
"""

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

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
from flexmoe_jax.artifacts.sealed import sha256_array, write_sealed
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.artifacts.signature import Signature, Trust, check_signature, write_signature
from flexmoe_jax.errors import ArtifactError, Check, FlexMoEError, printable
from flexmoe_jax.files import (
    NOT_A_FILE,
    copy_file,
    digest_files,
    list_files,
    lock_directory,
    new_directory,
    remove_partial_files,
    sha256_file,
)
from flexmoe_jax.foreign import is_sparse
from flexmoe_jax.json_files import read_bytes
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import Params, flatten, unflatten

_OF_FILE_BROWSERS = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini)")


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

    `params` is the owner's subtree (NumPy or JAX arrays of float32, bfloat16 or float16, shapes of `owner_leaves`).
    `base` holds the content digests that the package is bound to: `tokenizer`, and for a data owner's expert also
    `trunk` and `public`. `record` holds JSON values (training, router, licence, contact: see record.py). ArtifactError
    for an existing path and for parameters that are missing, unknown, of another shape or dtype, or not finite.
    """
    arrays = _check_params(owner, params, config)
    check_base(owner, base)
    made = make_record(record, owner)
    tensors = _tensor_records(arrays)
    with new_directory(pathlib.Path(path)) as folder:
        save_arrays(folder / "arrays", arrays)
        table = _to_json(tensors)
        (folder / "card.md").write_text(_card(owner, tensors, base, made), encoding="utf-8")
        fields = {
            "format": FORMAT,
            "owner": owner,
            "config": to_mapping(config),
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
    """The digest that identifies an owner's parameters: `content` of the manifest that `write_package` writes."""
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    return sealed.digest(_to_json(_tensor_records(arrays)))


def load_package(
    path: pathlib.Path | str, *, verify: bool = True, digest: str | None = None, mapped: bool = False
) -> Params:
    """The owner's subtree as NumPy arrays, bit for bit as it was written.

    Names, kinds and sizes of files and the headers of arrays are checked before any array is allocated, then the sha256
    of exactly the bytes that are returned; `verify=False` skips the sha256. `digest` is the manifest digest that the
    package must have. `mapped` arrays are memory-mapped files, checked once beforehand: for processes that each read a
    part. ArtifactError lists everything that is wrong.
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
    """Checks of the manifest, the signature, every file and every tensor; damage is reported, never raised.

    `quick` reads only the manifest and the headers of arrays: names, kinds and sizes, not contents. A signature must be
    valid and, with `trust`, made with a trusted key.
    """
    path = pathlib.Path(path)
    try:
        manifest = read_manifest(path, owner)
    except FlexMoEError as error:
        return [Check("manifest.json", False, error.what, error.remedy)]
    first = [Check("manifest.json", True, manifest.digest)]
    try:
        line = check_signature(path, manifest.owner, manifest.digest, trust)
        first += [Check(SIGNATURE, True, line)] if line else []
    except ArtifactError as error:
        first.append(Check(SIGNATURE, False, error.what, error.remedy))
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
    if all(f.ok for f in checks):  # otherwise the file is reported already: a tensor's bytes are its file's
        for name, t in manifest.tensors.items():
            wrong = f": {bad[name]} values are not finite" if bad[name] else ""
            checks.append(Check(name, not wrong, f"{t.dtype}{list(t.shape)} {t.sha256}{wrong}"))
    return [*first, *checks]


def check_files(path: pathlib.Path, manifest: Manifest) -> list[Check]:
    """Checks of a package's files without their contents: none missing, none added, kinds, sizes, array headers."""
    found, others = list_files(path)
    for name in ("manifest.json", SIGNATURE):  # checked by their own digests
        found.pop(name, None)
    checks = [Check(name, False, NOT_A_FILE) for name in others]
    checks += [Check(n, False, "the manifest does not name this file") for n in sorted({*found} - {*manifest.files})]
    for name, file in manifest.files.items():
        if name not in found:
            checks.append(Check(name, False, "missing"))
        elif found[name] != file.size:
            checks.append(Check(name, False, f"has {found[name]} bytes, the manifest says {file.size}"))
        elif is_sparse((path / name).lstat()):
            checks.append(Check(name, False, f"has {file.size} bytes, but almost no blocks on the disk"))
        else:
            checks.append(Check(name, True, f"{file.size} bytes"))
    if all(f.ok for f in checks):
        headers = {header_file(n): header_problem(path, n, t.shape, t.dtype) for n, t in manifest.tensors.items()}
        headers[METADATA_FILE] = metadata_problem(path)
        checks += [Check(name, False, problem) for name, problem in headers.items() if problem]
    return checks


def sign_package(package: pathlib.Path | str, key: pathlib.Path | str, version: int) -> Signature:
    """Signs the package's manifest as its owner's `version` (1, 2, ...); replaces an older signature, atomically.

    `key` is a private key file. The package is read and checked first. ArtifactError for a package inside a model, a
    damaged one, a version below 1 or below that of the present signature, and a key that cannot be used.
    """
    package = pathlib.Path(package)
    if (package.resolve().parent / "model.json").exists():
        raise ArtifactError(f"{package} is in a model", "sign the package, then merge it; sign a release as a whole")
    with lock_directory(package):
        check_before_signing(package)
        return write_signature(package, key, version)


def check_before_signing(package: pathlib.Path) -> None:
    """ArtifactError for a damaged package. Removes what an interrupted signing left; hold a lock."""
    remove_partial_files(package)
    raise_problems(package, verify_package(package))


def check_own_files(path: pathlib.Path) -> None:
    """ArtifactError for a package with hard links: the other name of a file could be used to change it later."""
    shared = [name for name in list_files(path)[0] if (path / name).lstat().st_nlink > 1]
    if shared:
        raise ArtifactError(
            f"{path} holds hard links: {', '.join(shared)}",
            "copy the package (cp -r), or merge with links (--link) if you made them yourself",
        )


def copy_package(source: pathlib.Path, target: pathlib.Path, manifest: Manifest, link: bool = False) -> None:
    """Copies (or hard-links) a package into the new directory `target` and checks every byte on the way.

    ArtifactError for damage, a signature that is not valid, or a source that changes meanwhile.
    """
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
    """ArtifactError that lists every check that is not ok; nothing if there is none."""
    problems = [f for f in checks if not f.ok]
    if not problems:
        return
    remedy = FETCH_AGAIN
    if all(_OF_FILE_BROWSERS.fullmatch(f.subject) for f in problems):
        remedy = f"delete {', '.join(str(path / f.subject) for f in problems)}: a file browser made them"
    raise ArtifactError(
        f"{path} is damaged:\n    " + "\n    ".join(printable(f"{f.subject}: {f.detail}") for f in problems), remedy
    )


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
    """ArtifactError if an array holds NaN or infinity."""
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
        return f"unknown, it cannot be read ({error.strerror})"


def _compare(name: str, found: str, expected: str) -> Check:
    ok = found == expected
    return Check(name, ok, expected if ok else f"has sha256 {found}, the manifest says {expected}")


def _check_chunk(source: pathlib.Path, name: str, dtype: str, chunk: bytes) -> None:
    if bad := not_finite(chunk, dtype):
        raise ArtifactError(
            f"{source}: the tensor {name!r} holds {bad} or more values that are not finite", FETCH_AGAIN
        )


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
