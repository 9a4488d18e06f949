"""Digests of a run's data, remembered in the run directory: process 0 reads a file once, and again when it changed.

A file counts as unchanged while its path, size, time of modification (in nanoseconds) and inode stay the same. Damage
that leaves all of them alone is not seen at a later start; `flexmoe verify` always reads everything. Models, packages
and checkpoints are checked byte by byte at every use, and are not remembered.
"""

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from flexmoe_jax.artifacts.sealed import is_sha256
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import sha256_file, write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.parallel.processes import digest_from_lead, is_lead

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

    def file(self, path: pathlib.Path) -> str:
        """sha256 (hex) of a file's bytes; it may be a link."""
        return self.digest(f"file {path.absolute()}", [path], lambda: sha256_file(path.resolve()))

    def digest(self, what: str, files: Sequence[pathlib.Path], compute: Callable[[], str]) -> str:
        """The sha256 (hex) called `what`: `compute()`, which reads `files`, or the one remembered if none changed.

        A file that changes while it is read is not remembered.
        """
        if not is_lead():
            return digest_from_lead("")
        before, known = _states(files), self._known.get(what)
        if isinstance(known, dict) and known.get("files") == before and is_sha256(known.get("sha256")):
            return digest_from_lead(known["sha256"])
        found = compute()
        if _states(files) == before:
            self._known[what] = {"files": before, "sha256": found}
            write_json(self._path, self._known)
        return digest_from_lead(found)


def _states(files: Sequence[pathlib.Path]) -> dict[str, Any]:
    """{path: [size in bytes, time of modification in ns, inode]}."""
    found = {str(file.absolute()): file.stat() for file in files}
    return {path: [status.st_size, status.st_mtime_ns, status.st_ino] for path, status in found.items()}
