"""Router tuning on proxies, after the merge (paper section 3.3): rows and biases of the owners, nothing else.

Alone, each owner's row is tuned in the pair {public, owner} on its own proxies and public text: what it becomes does
not depend on who else is there, so that opting out stays exact. Together, as the paper does it, all rows are tuned at
once on everybody's proxies: whoever leaves later has had a part in rows that stay, and the packages say so. The public
row never moves; softmax knows rows by their differences alone, so nothing is lost.

Whatever is tuned is a new package of its owner. The untuned ones stay where they are.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.artifacts.manifest import Manifest
from flexmoe_jax.artifacts.model_dir import ModelDir, assemble, open_model
from flexmoe_jax.artifacts.package import load_package, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import differences, parse_json, read_bytes, write_json
from flexmoe_jax.config import OptimizerConfig, RunConfig
from flexmoe_jax.data.sources import blend, content_digest
from flexmoe_jax.errors import ArtifactError, DataError
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, check_known

log = logging.getLogger(__name__)
TOGETHER = "together"
FROZEN = "trunk/.*|experts/public/.*|experts/.*/w_(gate|up|down)"


def tune(
    model: pathlib.Path | str,
    proxies: Mapping[str, pathlib.Path | str],
    public_data: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    together: bool = False,
    steps: int = 100,
    batch_size: int = 8,
    seq_len: int | None = None,
    lr: float = 2e-3,
    seed: int = 0,
) -> ModelDir:
    """Tunes the router of the model directory `model`; `out`/model is the tuned one, `out`/packages its owners' parts.

    `proxies` are folders of public documents by owner; owners without any keep their rows. A step takes `batch_size`
    sequences: alone, half of them public; together, every owner's proxies and public text in equal parts. `out` is
    resumed like a run directory, and refused when it holds another tuning. Raises ArtifactError or DataError for
    unknown owners and missing documents.
    """
    opened, out = open_model(model), pathlib.Path(out)
    owners = [name for name in check_known({PUBLIC, *proxies}, opened.experts) if name != PUBLIC]
    if not owners:
        raise DataError("there are no proxies", "give a folder of them for at least one owner")
    details: dict[str, Any] = {
        "form": TOGETHER if together else "alone", "from": opened.digest, "steps": steps, "batch_size": batch_size,
        "seq_len": seq_len or opened.config.max_seq_len, "lr": lr, "seed": seed,
        "proxies": {name: content_digest(proxies[name]) for name in owners}, "public_data": content_digest(public_data),
    }  # fmt: skip
    _check_same(out / "tuning.json", details)
    if (out / "model").exists():
        log.info(f"{out / 'model'} is already there: nothing to do")
        return open_model(out / "model")
    options: dict[str, Any] = {
        "public": str(model), "steps": steps, "batch_size": batch_size, "seq_len": details["seq_len"],
        "optimizer": OptimizerConfig(lr=lr, warmup_steps=min(100, steps // 10)), "seed": seed, "freeze": FROZEN,
    }  # fmt: skip
    packages = {PUBLIC: (opened.package(PUBLIC), opened.manifests[PUBLIC])}
    packages |= {n: (opened.package(n), opened.manifests[n]) for n in opened.experts if n not in (PUBLIC, *owners)}
    if together:
        data = out / "data" / "train.jsonl"
        blend([*(pathlib.Path(proxies[name]) for name in owners), pathlib.Path(public_data)], data)
        others = [f"|experts/{name}/.*" for name in opened.experts if name not in (PUBLIC, *owners)]
        run = RunConfig(owner=PUBLIC, data=str(data.parent), out=str(out / "runs" / TOGETHER),
                        top_k=opened.wanted_top_k, **options | {"freeze": FROZEN + "".join(others)})  # fmt: skip
        made = open_model(train(run))
        tuned = {name: (made.package(name), made.manifests[name], owners) for name in owners}
    else:
        tuned = {}
        for name in owners:
            run = RunConfig(
                owner=name, expert=str(opened.package(name)), data=str(proxies[name]), public_data=str(public_data),
                public_fraction=0.5, out=str(out / "runs" / name), **options,
            )  # fmt: skip
            package = train(run)
            tuned[name] = (package, read_manifest(package, name), [name])
    for name, (path, manifest, moved_by) in tuned.items():
        packages[name] = _package(out / "packages" / name, opened.manifests[name], path, manifest, moved_by)
    ordered = {name: packages[name] for name in opened.experts}
    return assemble(out / "model", opened, ordered, opened.wanted_top_k, "tuned", details)


def _check_same(path: pathlib.Path, details: dict) -> None:
    """Refuses a folder that holds another tuning: what lies there would be taken for this one's."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, details)
    elif lines := differences(parse_json(read_bytes(path), path), details):
        raise ArtifactError(
            f"{path.parent} holds another tuning (there != now):\n    " + "\n    ".join(lines), "give another folder"
        )


def _package(
    path: pathlib.Path, before: Manifest, made: pathlib.Path, manifest: Manifest, moved_by: list[str]
) -> tuple[pathlib.Path, Manifest]:
    """The tuned package of an owner: its own records, and how it was tuned."""
    params = load_package(made, digest=manifest.digest)
    moved = [n for n, t in manifest.tensors.items() if n.startswith("w_") and t.sha256 != before.tensors[n].sha256]
    if moved:
        raise ArtifactError(f"tuning moved {', '.join(moved)} of {before.owner!r}", "do not use what it made")
    parts = sorted({*before.record.tuned_with, *moved_by})  # whoever had a part before still has
    tuned = {"start": before.digest, "with": parts, "training": manifest.record.training}
    if not path.exists():
        write_package(path, owner=before.owner, params=params, config=before.config, base=before.base,
                      record={**before.record.fields, "tuned": tuned})  # fmt: skip
    return path, read_manifest(path, before.owner)
