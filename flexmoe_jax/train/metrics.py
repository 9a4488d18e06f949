"""Metrics as one JSON object per line, written by process 0."""

import json
import pathlib

from flexmoe_jax.artifacts.digest import write_bytes


class MetricsFile:
    """Appends to `path`; on opening for a resumed run, lines of step `resume_step` and later are dropped.

    Use it in a `with` block. Where it is not `written`, nothing is.
    """

    def __init__(self, path: pathlib.Path, resume_step: int = 0, written: bool = True):
        self._file = None
        if not written:
            return
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text().splitlines():
                # A line cut short by a crash is always the last one, and never of a step before the checkpoint.
                if line.endswith("}") and json.loads(line)["step"] < resume_step:
                    kept.append(line + "\n")
        write_bytes(path, "".join(kept).encode())  # whole or not at all: a second crash must not cost the first lines
        self._file = path.open("a", buffering=1)

    def write(self, values: dict) -> None:
        if self._file:
            self._file.write(json.dumps(values) + "\n")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()
