"""Metrics as one JSON object per line, written by process 0."""

import json
import pathlib


class MetricsFile:
    """Appends to `path`; on opening for a resumed run, lines of step `resume_step` and later are dropped."""

    def __init__(self, path: pathlib.Path, resume_step: int = 0):
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text().splitlines():
                # A line cut short by a crash is always the last one, and never of a step before the checkpoint.
                if line.endswith("}") and json.loads(line)["step"] < resume_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, values: dict) -> None:
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()
