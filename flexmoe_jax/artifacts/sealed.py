"""Digests of values and arrays, and the JSON files that carry them.

A *sealed* JSON file is an object with a `digest` field: the sha256 of the canonical JSON of all its other fields. Its
bytes depend only on its value, and no other bytes are accepted, so that any altered byte is detected.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from flexmoe_jax.config import to_mapping
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import json_bytes, write_json

# Sealed files of real models have a few kilobytes. JSON of tiny values takes 30 times its size in memory.
MAX_JSON_BYTES = 2 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_JSON_DEPTH = 32


def digest(value: Any) -> str:
    """sha256 (hex) of `canonical_json(value)`; a configuration counts as its mapping."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_mapping(value)
    return hashlib.sha256(canonical_json(value)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The bytes of a JSON value that digests and signatures cover: sorted keys, no spaces, UTF-8.

    ValueError for NaN, infinity and lone surrogates.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


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


def parse_json(raw: bytes, where: object, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from `raw`.

    ArtifactError for repeated keys, NaN, anything but an object, over `limit` bytes, or too deep nesting.
    """
    if len(raw) > limit:
        raise ArtifactError(f"{where} has over {limit} bytes", "give a file that this library wrote")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_no_doubled_keys, parse_constant=_no_constant)
        canonical_json(value)  # refuses values without a canonical form: infinite numbers, lone surrogates
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON: {error}", "restore the file from its source") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} holds a {type(value).__name__}, not an object", "restore it from its source")
    level: list = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, dict | list)]
    if level:
        what = f"{where} is nested more than {MAX_JSON_DEPTH} deep"
        raise ArtifactError(what, "give a file that this library wrote")
    return value


def read_bytes(path: pathlib.Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; ArtifactError for a link, a missing or a longer file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{path} is not a regular file", "do not use this directory")
            raw = file.read(min(status.st_size, limit) + 1)  # `read` allocates its argument
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", "give the directory that holds it") from error
    if len(raw) > limit:
        raise ArtifactError(f"{path} has over {limit} bytes", "give a file that this library wrote")
    return raw


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


def _no_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name} is not JSON")
