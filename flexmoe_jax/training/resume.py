"""What a run directory belongs to: the configuration and data that must not change between a run and its resumption."""

import json
import logging
import pathlib
from collections.abc import Collection

from flexmoe_jax.artifacts.sealed import differences, sha256_array, write_json
from flexmoe_jax.config import RunConfig, to_mapping
from flexmoe_jax.data.sources import content_digest
from flexmoe_jax.data.store import TokenStore
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.parallel.processes import barrier, is_lead
from flexmoe_jax.training.start import Stage
from flexmoe_jax.tree import flatten

log = logging.getLogger(__name__)

# Keys that may differ between a run and its resumption: they change neither the data nor the mathematics.
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
    """What must not change between a run and its resumption. Paths may: what they lead to is known by digest."""
    config = {key: value for key, value in to_mapping(run).items() if key not in RESUMABLE}
    data = {
        name: {"tokens": store.digest, "documents": _documents_digest(pathlib.Path(path or ""))}
        for name, path, store in zip(("own", "public"), (run.data, run.public_data), stores, strict=False)
    }
    router = stage.router | {"rows": sha256_array(stage.params["experts"][run.owner]["router"])}
    digests = {"data": data, "tokenizer": stage.tokenizer.digest, "base": stage.base}
    start = {"start": stage.history["start"]} if "start" in stage.history else {}
    return {"config": config, "router": router, **digests, **start}


def _documents_digest(folder: pathlib.Path) -> str | None:
    """Of the documents as they are now: the run's tokens were made of what they were at its start."""
    return None if (folder / "index.json").exists() or any(folder.glob("*.npy")) else content_digest(folder)


def check_identity(path: pathlib.Path, identity: dict, allow: Collection[str]) -> None:
    identity = json.loads(json.dumps(identity))
    lines = differences(json.loads(path.read_text()), identity) if path.exists() else []
    changed = {line.partition(": ")[0]: line for line in lines}
    known = {*(key.replace("/", ".") for key in flatten(identity)), *changed}
    for key in allow:
        if key not in known:
            raise ConfigError(f"--allow={key} names nothing that a run keeps to", did_you_mean(key, known))
    if refused := [line for key, line in changed.items() if key not in allow]:
        raise ArtifactError(
            f"the run directory {path.parent} belongs to another run (there != now):\n    " + "\n    ".join(refused),
            "give another config.out, the configuration and data this run was started with, or --allow=KEY",
        )
    for line in lines:
        log.info(f"changed as allowed: {line}")
    if (lines or not path.exists()) and is_lead():
        write_json(path, identity)
    barrier("identity")
