"""The identity of a run directory: the configuration and data that must not change when a run resumes."""

import json
import logging
import pathlib
from collections.abc import Collection

from flexmoe_jax.artifacts.sealed import differences, sha256_array, write_json
from flexmoe_jax.config import RunConfig, to_mapping
from flexmoe_jax.data.records import Fields
from flexmoe_jax.data.sources import content_digest
from flexmoe_jax.data.store import TokenStore, kind_of
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.parallel.processes import barrier, is_lead
from flexmoe_jax.training.start import Stage
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
)


def identity_of(run: RunConfig, stage: Stage, stores: list[TokenStore]) -> dict:
    """What must not change when a run resumes. Paths may change: their contents are identified by digest."""
    config = {key: value for key, value in to_mapping(run).items() if key not in RESUMABLE}
    data = {
        name: {"tokens": store.digest, "documents": _documents_digest(run, key)}
        for name, key, store in zip(("own", "public"), ("data", "public_data"), stores, strict=False)
    }
    router = stage.router | {"rows": sha256_array(stage.params["experts"][run.owner]["router"])}
    digests = {"data": data, "tokenizer": stage.tokenizer.digest, "base": stage.base}
    start = {"start": stage.history["start"]} if "start" in stage.history else {}
    return {"config": config, "router": router, **digests, **start}


def fields_of(run: RunConfig, key: str) -> Fields:
    """The fields of the documents in `config.key`; public documents always have the default ones."""
    return Fields(run.text_field, run.id_field) if key == "data" else Fields()


def _documents_digest(run: RunConfig, key: str) -> str | None:
    """Digest of the documents as they are now; the run's tokens are those of its start. None for token files."""
    folder = pathlib.Path(getattr(run, key))
    return content_digest(folder, fields=fields_of(run, key)) if kind_of(folder) == "documents" else None


def check_identity(path: pathlib.Path, identity: dict, allow: Collection[str]) -> None:
    """Compares `identity` with the file `path` (`run.json`), or writes that file for a new run.

    Keys in `allow` (dotted) may differ and are updated. ArtifactError for any other difference, ConfigError for a key
    that an identity does not have.
    """
    identity = json.loads(json.dumps(identity))
    lines = differences(json.loads(path.read_text()), identity) if path.exists() else []
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
    if (lines or not path.exists()) and is_lead():
        write_json(path, identity)
    barrier("identity")
