"""Router tuning on proxies after the merge (FlexOlmo, arXiv 2507.07024, section 3.3): only owners' rows and biases.

By default each owner's row is tuned by itself, in the pair {public, owner}, on its own proxies and public text. The
result does not depend on the other owners, so that opting out stays exact. With `together`, as in the paper, all rows
are tuned at once on all proxies: the data of an owner that leaves later influenced rows that stay, and the packages
record it. The public row is fixed; softmax depends only on differences of rows, so that nothing is lost.

Each tuned row becomes a new package of its owner. The untuned packages are not changed.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.manifest import Manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.sources import blend, content_digest
from flexmoe_jax.errors import ArtifactError, DataError
from flexmoe_jax.files import remove_directory, write_json
from flexmoe_jax.json_files import parse_json, read_bytes
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.params import FFN_WEIGHTS, ranks_of
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, check_known

log = logging.getLogger(__name__)
TOGETHER = "together"
FROZEN = "trunk/.*|experts/public/.*|experts/.*/(w|head)_.*"
Part = tuple[pathlib.Path, Manifest]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The settings of router tuning."""

    together: bool = False
    """Tune all rows at once, as in the paper; opting out is then approximate."""

    steps: int = 100
    """Optimizer steps of each training."""

    batch_size: int = 8
    """Sequences per step. Half of them are public text; with `together`, equal parts are every owner's proxies and
    public text."""

    seq_len: int | None = None
    """Tokens per sequence; None: the model's maximum."""

    lr: float = 2e-3
    """Peak learning rate. The paper's."""

    seed: int = 0
    """Seed of the order of documents."""

    compute_dtype: str = "float32"
    """Dtype of activations and of frozen matrices: float32 or bfloat16."""


def tune(
    model: pathlib.Path | str,
    proxies: Mapping[str, pathlib.Path | str],
    public_data: pathlib.Path | str,
    out: pathlib.Path | str,
    tuning: Tuning = Tuning(),
) -> ModelDir:
    """Tunes the router of the model directory `model` into `out`/model; `out`/packages holds the owners' tuned parts.

    `proxies` holds folders of public documents by owner; owners without proxies keep their rows. `public_data` is a
    folder of public documents. The same call resumes an interrupted tuning. ArtifactError if `out` holds another
    tuning, FlexMoEError for unknown owners, DataError for missing documents.
    """
    opened, out = open_model(model), pathlib.Path(out)
    owners = [name for name in check_known({PUBLIC, *proxies}, opened.experts) if name != PUBLIC]
    if not owners:
        raise DataError("there are no proxies", "give a folder of proxies for at least one owner")
    folders = {name: pathlib.Path(proxies[name]) for name in owners}
    details = _details(opened, folders, pathlib.Path(public_data), tuning)
    _check_same(out, details)
    if (out / "model").exists():
        log.info(f"{out / 'model'} exists: nothing to do")
        return open_model(out / "model")
    options: dict[str, Any] = {
        "public": str(model),
        "steps": tuning.steps,
        "batch_size": tuning.batch_size,
        "seq_len": details["seq_len"],
        "optimizer": OptimizerConfig(lr=tuning.lr, warmup_steps=min(100, tuning.steps // 10)),
        "seed": tuning.seed,
        "compute_dtype": tuning.compute_dtype,
        "freeze": FROZEN,
        "eval_every": None,
    }
    work = _tune_together if tuning.together else _tune_each
    tuned = work(opened, folders, pathlib.Path(public_data), out, options)
    packages = {name: (opened.package(name), opened.manifests[name]) for name in opened.experts}
    for name, part in tuned.items():
        moved_by = owners if tuning.together else [name]
        packages[name] = _package(out / "packages" / name, packages[name], part, moved_by, packages[PUBLIC][0])
    return assemble(out / "model", opened, packages, opened.wanted_top_k, "tuned", details)


def _details(
    model: ModelDir, proxies: Mapping[str, pathlib.Path], public_data: pathlib.Path, tuning: Tuning
) -> dict[str, Any]:
    """The identity of a tuning: it must not change when the tuning resumes, and the journal records it."""
    return {
        "form": TOGETHER if tuning.together else "alone",
        "from": model.digest,
        "steps": tuning.steps,
        "batch_size": tuning.batch_size,
        "seq_len": tuning.seq_len or model.config.max_seq_len,
        "lr": tuning.lr,
        "seed": tuning.seed,
        "proxies": {name: content_digest(folder) for name, folder in proxies.items()},
        "public_data": content_digest(public_data),
        **({} if tuning.compute_dtype == "float32" else {"compute_dtype": tuning.compute_dtype}),  # as before the key
    }


def _tune_together(
    model: ModelDir,
    proxies: Mapping[str, pathlib.Path],
    public_data: pathlib.Path,
    out: pathlib.Path,
    options: dict[str, Any],
) -> dict[str, Part]:
    """Trains all rows together, on equal amounts of every owner's proxies and public text."""
    data = out / "data" / "train.jsonl"
    blend([*proxies.values(), public_data], data)
    others = [f"|experts/{name}/.*" for name in model.experts if name not in (PUBLIC, *proxies)]
    options = options | {"freeze": FROZEN + "".join(others), "out": str(out / "runs" / TOGETHER)}
    made = open_model(train(RunConfig(owner=PUBLIC, data=str(data.parent), top_k=model.wanted_top_k, **options)))
    return {name: (made.package(name), made.manifests[name]) for name in proxies}


def _tune_each(
    model: ModelDir,
    proxies: Mapping[str, pathlib.Path],
    public_data: pathlib.Path,
    out: pathlib.Path,
    options: dict[str, Any],
) -> dict[str, Part]:
    """Trains each owner's row by itself, half on its proxies and half on public text."""
    tuned = {}
    for name, folder in proxies.items():
        run = RunConfig(
            owner=name,
            expert=str(model.package(name)),
            data=str(folder),
            public_data=str(public_data),
            public_fraction=0.5,
            out=str(out / "runs" / name),
            **options,
        )
        package = train(run)
        tuned[name] = (package, read_manifest(package, name))
    return tuned


def _check_same(out: pathlib.Path, details: dict) -> None:
    """Compares the identity with `out`/tuning.json, or writes that file until a training in `out` has a checkpoint.

    ArtifactError if `out` holds another tuning.
    """
    path = out / "tuning.json"
    lines = differences(parse_json(read_bytes(path), path), details) if path.exists() else []
    if lines and (any(out.glob("runs/*/digests/*.json")) or (out / "packages").exists()):
        raise ArtifactError(
            f"{out} holds another tuning (there != now):\n    " + "\n    ".join(lines), "give another folder"
        )
    if lines:
        remove_directory(out / "data")  # blended of what a failed start had
    if lines or not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, details)


def _package(path: pathlib.Path, source: Part, part: Part, moved_by: Sequence[str], public: pathlib.Path) -> Part:
    """Writes the tuned package of an owner to `path`: the record of the package `source`, and how it was tuned.

    Its matrices stay in the form that they had: joint training makes low-rank changes whole.
    """
    (made, manifest), (original, before) = part, source
    params = load_package(made, digest=manifest.digest)
    kept = before.tensors.keys() & manifest.tensors.keys() - {"router", "bias"}
    moved = [name for name in sorted(kept) if _differ(name, manifest, before)]
    if ranks_of(before.tensors) and not ranks_of(manifest.tensors):
        own = load_package(original, digest=before.digest)
        whole = whole_expert(before.owner, own, load_package(public))
        moved += [name for name in FFN_WEIGHTS if not np.array_equal(whole[name], params[name])]
        params = own | {name: params[name] for name in ("router", "bias")}
    if moved:
        raise ArtifactError(f"tuning changed {', '.join(moved)} of {before.owner!r}", "do not use its result")
    owners = sorted({*before.record.tuned_with, *moved_by})  # earlier influence remains
    tuned = {"start": before.digest, "with": owners, "training": manifest.record.training}
    if not path.exists():
        record = {**before.record.fields, "tuned": tuned}
        write_package(path, owner=before.owner, params=params, config=before.config, base=before.base, record=record)
    return path, read_manifest(path, before.owner)


def _differ(name: str, one: Manifest, other: Manifest) -> bool:
    return one.tensors[name].sha256 != other.tensors[name].sha256
