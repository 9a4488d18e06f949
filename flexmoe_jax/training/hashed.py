"""Digests of a run's data, remembered in the run directory: process 0 reads a source once, and again when it changed.

A source counts as unchanged while path, size, time of modification (in nanoseconds) and inode of all its files stay the
same. Damage that leaves all of them alone is not seen at a later start; `flexmoe verify` always reads everything.
Models, packages and checkpoints are checked byte by byte at every use, and are not remembered.

The data must be the same on every host. Process 0 alone reads all bytes; the others compare names and sizes of their
files, and what the index of a token store states, with those of process 0. Damage in a host's own copy that leaves
these alone is not seen: use a shared disk.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from flexmoe_jax.artifacts.sealed import is_sha256
from flexmoe_jax.errors import ArtifactError, DataError
from flexmoe_jax.files import write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.parallel.processes import gather, is_lead

log = logging.getLogger(__name__)


class HashedFiles:
    """The digests that the JSON file `path` remembers; one that cannot be read remembers nothing.

    All processes must ask for the same digests in the same order: process 0 answers all of them.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._known = path, {}
        if is_lead() and path.exists():
            try:
                self._known = parse_json(read_bytes(path), path)
            except ArtifactError as error:
                log.info(f"all data is read again: {error.what}")

    def digest(self, what: str, files: Sequence[pathlib.Path], compute: Callable[[], str], stated: str = "") -> str:
        """The sha256 (hex) called `what`: `compute()`, which reads `files`, or the one remembered if none changed.

        Files that change while they are read are not remembered. DataError on every process where names or sizes of the
        files, or what they say of themselves (`stated`), are not the same on all processes.
        """
        _check_copies(what, files, stated)
        found = self._digest(ascii(what), files, compute) if is_lead() else "0" * 64
        return gather(bytes.fromhex(found))[0].hex()

    def _digest(self, key: str, files: Sequence[pathlib.Path], compute: Callable[[], str]) -> str:
        before, known = _state(files), self._known.get(key)
        if isinstance(known, dict) and known.get("files") == before and is_sha256(known.get("sha256")):
            return known["sha256"]
        found = compute()
        if _state(files) == before:
            self._known[key] = {"files": before, "sha256": found}
            write_json(self._path, self._known)
        return found


def _state(files: Sequence[pathlib.Path]) -> str:
    """sha256 (hex) over path, size in bytes, time of modification in ns, and inode of each file."""
    found = ((str(file.absolute()), file.stat()) for file in files)
    return _hash([[name, status.st_size, status.st_mtime_ns, status.st_ino] for name, status in found]).hex()


def _check_copies(what: str, files: Sequence[pathlib.Path], stated: str) -> None:
    sizes = [(str(file), file.stat().st_size) for file in files]
    total = sum(size for _, size in sizes)
    copies = gather(_hash([sizes, stated]) + len(sizes).to_bytes(8) + total.to_bytes(8))
    for number, copy in enumerate(copies):
        if copy != copies[0]:
            raise DataError(
                f"{what}: process {number} has {_words(copy)}, process 0 {_words(copies[0])}",
                "data must be the same on every host: put it on a shared disk, or copy it to every host again",
            )


def _words(copy: bytes) -> str:
    facts, count, total = copy[:32].hex(), int.from_bytes(copy[32:40]), int.from_bytes(copy[40:])
    return f"{count:,} file(s) of {total:,} bytes (names, sizes and index: sha256 {facts[:16]})"


def _hash(value: Any) -> bytes:
    """sha256 of a JSON value, whose strings may hold names that are not UTF-8: they are escaped."""
    return hashlib.sha256(json.dumps(value).encode()).digest()
