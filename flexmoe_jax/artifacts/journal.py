"""The journal of a model directory: its history, one sealed JSON object per line, with the sha256 of the line before.

`journal.jsonl` is only extended. It is the only file of a model that holds times, history, and the names of experts
that opted out.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.artifacts.sealed import check_fields, check_seal, is_sha256, seal
from flexmoe_jax.errors import ArtifactError, FlexMoEError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.json_files import MAX_TEXT_BYTES, parse_json, read_bytes
from flexmoe_jax.tree import ExpertName, expert_name

FILE = "journal.jsonl"
FIRST = "0" * 64
_FIELDS = {
    "seq": int,
    "prev": str,
    "event": str,
    "experts": list,
    "details": dict,
    "model": str,
    "time": str,
    "digest": str,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One event. `experts` and `model`, the digest of model.json, are those after the event.

    `manifests` holds the experts' manifest digests by name; it is empty in lines of earlier versions. `sha256` is that
    of the line: keep the last one elsewhere to detect truncation or a rewrite. `time` is UTC in ISO 8601.
    """

    seq: int
    event: str
    experts: tuple[ExpertName, ...]
    manifests: dict[ExpertName, str]
    details: dict[str, Any]
    model: str
    time: str
    sha256: str


def append_entry(folder: pathlib.Path, event: str, manifests: Mapping[str, str], model: str, **details: Any) -> None:
    """Adds one line to the journal of the model directory `folder`, atomically; creates the journal if there is none.

    `manifests` holds the manifest digests of the model's experts after the event, in canonical order; `model` is the
    digest of its model.json. ArtifactError if the existing journal is damaged.
    """
    path = folder / FILE
    raw = read_bytes(path, MAX_TEXT_BYTES) if path.exists() else b""
    lines = raw.splitlines(keepends=True)
    fields = {
        "seq": len(_parse(raw, path)),
        "prev": hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST,
        "event": event,
        "experts": list(manifests),
        "details": {**details, "manifests": dict(manifests)},
        "model": model,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    line = json.dumps(seal(fields), sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    write_bytes(path, raw + line)


def read_journal(folder: pathlib.Path) -> list[Entry]:
    """The journal of the model directory `folder`.

    ArtifactError if a line is altered or moved, or is missing before the last one.
    """
    entries = _parse(read_bytes(folder / FILE, MAX_TEXT_BYTES), folder / FILE)
    if not entries:
        raise ArtifactError(f"{folder / FILE} is empty", "restore the journal from its source")
    return entries


def _parse(raw: bytes, path: pathlib.Path) -> list[Entry]:
    entries, prev = [], FIRST
    for number, line in enumerate(raw.splitlines(keepends=True)):
        where = f"{path} line {number + 1}"
        fields = check_seal(parse_json(line, where), where)
        check_fields(fields, _FIELDS, where)
        if (fields["seq"], fields["prev"]) != (number, prev) or not line.endswith(b"\n"):
            raise ArtifactError(f"{where} does not follow the line before it", "restore the journal from its source")
        prev = hashlib.sha256(line).hexdigest()
        experts, manifests = _parse_experts(fields, where)
        entries.append(
            Entry(
                number,
                fields["event"],
                experts,
                manifests,
                fields["details"],
                fields["model"],
                fields["time"],
                prev,
            )
        )
    return entries


def _parse_experts(fields: dict, where: str) -> tuple[tuple[ExpertName, ...], dict[ExpertName, str]]:
    """The experts of a line and their manifest digests; ArtifactError for names or digests that are not valid."""
    try:
        experts = tuple(expert_name(name) for name in fields["experts"])
    except FlexMoEError as error:
        raise ArtifactError(f"{where}: {error.what}", "do not use this model") from error
    stated = fields["details"].get("manifests", {})
    if not isinstance(stated, dict) or (stated and {*stated} != {*experts}) or not all(map(is_sha256, stated.values())):
        raise ArtifactError(f"{where}: the manifests are {stated!r}", "do not use this model")
    return experts, {name: stated[name] for name in experts if stated}
