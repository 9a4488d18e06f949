"""The identity of a run directory: the configuration and data that must not change when a run resumes."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from flexmoe_jax.artifacts.sealed import differences, sha256_array, write_json
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.corpus import survey
from flexmoe_jax.data.records import Fields
from flexmoe_jax.data.sources import content_digest
from flexmoe_jax.data.store import TokenStore, kind_of
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.files import remove_directory
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.parallel.processes import barrier, is_lead
from flexmoe_jax.source_config import Source
from flexmoe_jax.training.hashed import HashedFiles
from flexmoe_jax.training.start import Start
from flexmoe_jax.tree import flatten

log = logging.getLogger(__name__)

# Keys that may change when a run resumes: they affect neither the data nor the mathematics.
RESUMABLE = (
    "out",
    "data",
    "public",
    "public_data",
    "domain_vector",
    "expert",
    "mesh",
    "log_every",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "max_bad_steps",
    "licence",
    "contact",
    "validation",
    "public_validation",
    "eval_every",
    "eval_bytes",
    "patience",
    "publish",
    "track",
)
TOKENS = {"own": "tokens", "public": "public_tokens"}  # in the run directory


def identity_of(
    run: RunConfig, initial: Start, stores: Mapping[str, TokenStore], documents: dict[str, str | None]
) -> dict:
    """What must not change when a run resumes. Paths may change: their contents are identified by digest.

    Of a mixture every source has its name, its digests and its weight.
    """
    config = {key: value for key, value in to_mapping(run).items() if key not in RESUMABLE}
    data: dict[str, dict] = {}
    for name, source in run.sources.items():
        side, mixed, part = name.partition(".")
        digests = {"tokens": stores[name].digest, "documents": documents[name]}
        if mixed:
            data.setdefault(side, {})[part] = digests | {"weight": source.weight}
        else:
            data[side] = digests
    router = initial.router | {"rows": sha256_array(initial.params["experts"][run.owner]["router"])}
    known = {"data": data, "tokenizer": initial.tokenizer.digest, "base": initial.base}
    start = {"start": initial.history["start"]} if "start" in initial.history else {}
    return {"config": config, "router": router, **known, **start}


def fields_of(run: RunConfig, key: str) -> Fields:
    """The fields of the documents in `config.key`; public documents always have the default ones."""
    return Fields(run.text_field, run.id_field) if key == "data" else Fields()


def read_identity(path: pathlib.Path) -> dict:
    """The identity in the file `path` (`run.json`); {} if there is none, ArtifactError if it cannot be read.

    The schedule of a run that recorded no length for it had that of its steps.
    """
    identity = parse_json(read_bytes(path), path) if os.path.lexists(path) else {}
    if optimizer := _optimizer_of(identity):
        optimizer.setdefault("schedule_steps", identity["config"].get("steps"))
    return identity


def _optimizer_of(identity: dict) -> dict:
    """The optimizer's configuration in an identity; {} where the file is damaged: `check_identity` tells."""
    config = identity.get("config")
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    return optimizer if isinstance(optimizer, dict) else {}


def with_schedule(run: RunConfig, path: pathlib.Path, started: bool) -> RunConfig:
    """`run` with the length of its schedule: where it gives none, that in the file `path` (`run.json`) of a run that
    has `started`, else its steps."""
    if run.optimizer.schedule_steps is None:
        before = _optimizer_of(read_identity(path)).get("schedule_steps") if started else None
        steps = before if isinstance(before, int) else run.steps
        run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, schedule_steps=steps))
    return run


def documents_of(run: RunConfig, hashed: HashedFiles) -> dict[str, str | None]:
    """{source: digest of the documents as they are now, None for token files}; `hashed` knows unchanged ones."""
    digests: dict[str, str | None] = {}
    for name, source in run.sources.items():
        digests[name] = None
        if kind_of(pathlib.Path(source.path)) == "documents":
            fields, files = fields_of(run, source.key), [file for file, _ in survey(source.path).files]
            what = f"documents {pathlib.Path(source.path).absolute()} {fields}"
            compute = functools.partial(content_digest, source.path, fields=fields)
            digests[name] = hashed.digest(what, files, compute)
    return digests


def tokens_of(out: pathlib.Path, name: str) -> pathlib.Path:
    """Where the run `out` keeps the tokens of the source `name`."""
    side, mixed, part = name.partition(".")
    return out / f"{TOKENS[side]}{mixed}{part}"


def made_of(run: RunConfig, source: Source, documents: str | None, tokenizer: str) -> dict[str, Any]:
    """What decides the tokens that `run` makes of a source: the digests of its `documents` and of the `tokenizer`, and
    the share of documents that is held out. The index of the tokens keeps it."""
    return {"documents": documents, "tokenizer": tokenizer, "holdout": holdout_of(run, source)}


def holdout_of(run: RunConfig, source: Source) -> float:
    """The share of a source's documents that is never trained on: public documents are all trained on."""
    return run.holdout if source.key == "data" else 0.0


def drop_stale_tokens(tokens: pathlib.Path, made: dict[str, Any]) -> None:
    """Deletes the token store `tokens` that a failed start made of anything but `made` (see `made_of`).

    The index says what it was made of, and appears together with the tokens: whatever failed in between, it is true.
    """
    try:
        index = parse_json(read_bytes(tokens / "index.json"), tokens)
    except ArtifactError:  # missing or damaged
        index = {}
    if index.get("made_of") != made:
        remove_directory(tokens)


def check_identity(path: pathlib.Path, identity: dict, allow: Collection[str], started: bool) -> None:
    """Compares `identity` with the file `path` (`run.json`) of a run that has `started`; writes it for any other.

    A run has started when it has a checkpoint: a start that failed before binds nothing. Keys in `allow` (dotted) may
    differ and are updated. ArtifactError for any other difference, ConfigError for a key that an identity does not
    have.
    """
    identity = json.loads(json.dumps(identity))
    lines = differences(read_identity(path), identity) if started else []
    changed = {line.partition(": ")[0]: line for line in lines}
    known = {*(key.replace("/", ".") for key in flatten(identity)), *changed}
    for key in allow:
        if key not in known:
            raise ConfigError(f"--allow={key} is not a key of run.json", did_you_mean(key, known))
    if refused := [line for key, line in changed.items() if key not in allow]:
        raise ArtifactError(
            f"the run directory {path.parent} belongs to another run (there != now):\n    " + "\n    ".join(refused),
            "give another config.out, the configuration and data of the start of this run, or --allow=KEY",
        )
    for line in lines:
        log.info(f"changed as allowed: {line}")
    if (lines or not started) and is_lead():
        write_json(path, identity)
    barrier("identity")
