"""JSON in the form of our own artifacts, and small files: read in bounded time and memory, or refused by name."""

import collections
import json
import os
import pathlib
import stat
from typing import Any, NoReturn

from flexmoe_jax.errors import ArtifactError

# Sealed files of real models have a few kilobytes. JSON of tiny values takes 30 times its size in memory.
MAX_JSON_BYTES = 2 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_JSON_DEPTH = 32


def canonical_json(value: Any) -> bytes:
    """The bytes of a JSON value that digests and signatures cover: sorted keys, no spaces, UTF-8.

    ValueError for NaN, infinity and lone surrogates.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_json(raw: bytes, where: object, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from `raw`; ArtifactError as of `parse_value`, and for anything but an object."""
    value = parse_value(raw, where, limit)
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} holds a {type(value).__name__}, not an object", "restore it from its source")
    return value


def parse_value(raw: bytes, where: object, limit: int = MAX_JSON_BYTES) -> Any:
    """A JSON value from `raw`.

    ArtifactError for repeated keys, NaN, infinite numbers, lone surrogates, over `limit` bytes, or too deep nesting.
    """
    if len(raw) > limit:
        raise ArtifactError(f"{where} has over {limit} bytes", "give a file that this library wrote")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_no_doubled_keys, parse_constant=_no_constant)
        canonical_json(value)  # refuses values without a canonical form: infinite numbers, lone surrogates
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON: {error}", "restore the file from its source") from error
    level: list = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
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


def _no_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (doubled, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {doubled!r} is given twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name} is not JSON")
