"""Digests of values and arrays, and the JSON files that carry them.

A *sealed* JSON file is an object with a `digest` field: the sha256 of the canonical JSON of all its other fields. Its
bytes depend only on its value, and no other bytes are accepted, so that any altered byte is detected.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import json_bytes, write_json
from flexmoe_jax.json_files import canonical_json, parse_json, read_bytes
from flexmoe_jax.mapping import to_mapping


def digest(value: Any) -> str:
    """sha256 (hex) of `canonical_json(value)`; a configuration counts as its mapping."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_mapping(value)
    return hashlib.sha256(canonical_json(value)).hexdigest()


def differences(ours: Mapping, theirs: Mapping, prefix: str = "") -> list[str]:
    """Lines `key: ours != theirs` for every leaf in which two nested mappings differ."""
    lines = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} != {b!r}")
    return lines


def sha256_array(array: np.ndarray) -> str:
    """sha256 (hex) of an array's little-endian C-order bytes; it covers neither dtype nor shape."""
    flat = np.ascontiguousarray(array).reshape(-1)
    little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.view(np.uint8).data).hexdigest()


def is_sha256(value: Any) -> bool:
    """Whether `value` is a sha256 in lower-case hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def seal(value: dict) -> dict:
    """`value` with the `digest` field added."""
    return {**value, "digest": digest(value)}


def check_seal(value: dict, where: object) -> dict:
    """`value`; ArtifactError if its `digest` field is wrong."""
    found, expected = value.get("digest"), digest({key: v for key, v in value.items() if key != "digest"})
    if found != expected:
        raise ArtifactError(
            f"{where} was altered: it states the digest {found}, its content has {expected}",
            "restore it from its source",
        )
    return value


def write_sealed(path: pathlib.Path, value: dict) -> str:
    """Writes `value` sealed, atomically; returns the digest."""
    sealed = seal(value)
    write_json(path, sealed)
    return sealed["digest"]


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote, with its `digest`; ArtifactError for any altered byte."""
    raw = read_bytes(path)
    value = check_seal(parse_json(raw, path), path)
    if json_bytes(value) != raw:
        raise ArtifactError(f"{path} is not in canonical form", "restore it from its source, do not edit it")
    return value


def check_fields(value: dict, fields: dict[str, type], where: object) -> None:
    """ArtifactError unless the object has exactly these keys, with values of exactly these types."""
    for name in sorted({*value, *fields}):
        if name not in value or name not in fields:
            problem = "is missing" if name in fields else "is not known"
            raise ArtifactError(f"{where}: the key {name!r} {problem}", "use the version of flexmoe_jax that wrote it")
        if type(value[name]) is not fields[name]:
            raise ArtifactError(
                f"{where}: {name} is a {type(value[name]).__name__}, not a {fields[name].__name__}",
                "restore it from its source",
            )


def check_format(value: dict, known: str, where: object) -> None:
    """ArtifactError unless the object states the format `known`."""
    if value.get("format") != known:
        raise ArtifactError(
            f"{where} has the format {value.get('format')!r}, this version reads {known!r}",
            "use the version of flexmoe_jax that wrote it",
        )
