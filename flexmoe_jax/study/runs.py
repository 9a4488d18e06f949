"""Runs of one seed, each in a folder of its own: skipped when it is done, resumed when it was begun."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.model_dir import create_model, open_model
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.tune import tune
from flexmoe_jax.config import OptimizerConfig, RunConfig
from flexmoe_jax.data.embedding import DomainVector
from flexmoe_jax.study.baselines import branch_train_mix
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.train.loop import train
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, split

log = logging.getLogger(__name__)

RANDOM_ROW_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Runs:
    """Trains or finds what one seed is made of, each in a folder of `home` named after it."""

    config: StudyConfig
    shared: pathlib.Path
    home: pathlib.Path
    seed: int

    def train(self, name: str, *, data: str, steps: int, **changes) -> pathlib.Path:
        """The product of a run, trained or found; `data` is a domain of the mix, or a folder beside it."""
        folder = self.shared / "mix" / data if (self.shared / "mix" / data).exists() else self.shared / data
        options: dict[str, Any] = {
            "optimizer": OptimizerConfig(lr=1.5e-3, warmup_steps=10, weight_decay=0.1),
            "out": str(self._place("runs", name)),
            "batch_size": self.config.batch_size,
            "seq_len": self.config.seq_len,
            "seed": self.seed,
            "save_every": 200,
        }
        product = train(RunConfig(data=str(folder), steps=steps, **options | changes))
        log.info(f"seed {self.seed}: {name}: {product}")
        return product

    def merged(self, name: str, release: pathlib.Path, changes: dict, random_rows: bool) -> pathlib.Path:
        """Every owner's expert, trained with `changes`, and the model merged of them."""
        packages = []
        for i, owner in enumerate(self.config.owners):
            vector = self.shared / "domains" / f"{owner}.json"
            if random_rows:
                make = functools.partial(random_row, vector, self.seed, i)
                vector = self.made(f"random row {owner}.json", make)
            options: dict[str, Any] = {
                "public": str(release),
                "public_data": str(self.shared / "mix" / PUBLIC),
                "public_fraction": 0.25,
                "router_contrast": 0.1,
                "domain_vector": str(vector),
            }
            packages.append(self.train(f"{name} {owner}", owner=owner, data=owner, steps=self.config.owner_steps,
                                       **options | changes))  # fmt: skip
        return self.made(f"merged {name}", lambda to: merge(release, packages, to, top_k=self.config.top_k))

    def tuned(self, name: str, model: pathlib.Path, together: bool) -> pathlib.Path:
        """`model` with its router tuned on proxies."""
        proxies = {owner: self.shared / "proxies" / owner for owner in self.config.owners}
        sizes = {"batch_size": self.config.batch_size, "seq_len": self.config.seq_len, "steps": self.config.tune_steps}
        made = tune(model, proxies, self.shared / "mix" / PUBLIC, self._place("made", name), together=together,
                    seed=self.seed, **sizes)  # fmt: skip
        log.info(f"seed {self.seed}: {name}: {made.path}")
        return made.path

    def at_norm(self, release: pathlib.Path, scale: float | None) -> pathlib.Path:
        """`release` with rows that begin at the norm `scale`; itself if it has them, or for None."""
        if scale in (None, open_model(release).manifests[PUBLIC].record.fields["router"]["scale"]):
            return release
        return self.made(f"public, rows of norm {scale}", functools.partial(rescale, release, scale))

    def made(self, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
        """What `make` writes at a path of its own, once; it must write whole or not at all."""
        path = self._place("made", name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def _place(self, kind: str, name: str) -> pathlib.Path:
        return self.home / kind / re.sub("[,']", "", name).replace(" ", "_")


def random_row(vector: pathlib.Path, seed: int, owner: int, path: pathlib.Path) -> None:
    """A domain vector without the domain: a direction drawn at random."""
    true = DomainVector.load(vector)
    generator = np.random.Generator(np.random.Philox([RANDOM_ROW_SEED + seed, owner]))
    dataclasses.replace(true, vector=generator.standard_normal(true.vector.size).astype(np.float32)).save(path)


def rescale(public: pathlib.Path, scale: float, path: pathlib.Path) -> None:
    """The release with its router row, and so every owner's to come, at another norm."""
    model, release = load(public), open_model(public)
    record = json.loads(json.dumps(release.manifests[PUBLIC].record.fields))
    expert = dict(model.params["experts"][PUBLIC])
    expert["router"] = np.asarray(expert["router"] * (scale / record["router"]["scale"]), np.float32)
    record["router"]["scale"] = scale
    params = {**model.params, "experts": {PUBLIC: expert}}
    create_model(path, params, model.config, release.tokenizer_path, {TRUNK: record, PUBLIC: record})


def btx_start(config: StudyConfig, public: pathlib.Path, dense: dict, seed: int, path: pathlib.Path) -> None:
    models = {name: load(folder).params for name, folder in {PUBLIC: public, **dense}.items()}
    _write_joint(config, public, branch_train_mix(models), seed, path)


def upcycled(config: StudyConfig, public: pathlib.Path, seed: int, path: pathlib.Path) -> None:
    """As many copies of the public feed-forward network as the method has experts (Komatsuzaki et al., 2212.05055)."""
    params = load(public).params
    experts = dict.fromkeys((PUBLIC, *config.owners), params["experts"][PUBLIC])
    _write_joint(config, public, {**params, "experts": experts}, seed, path)


def _write_joint(config: StudyConfig, public: pathlib.Path, params: Params, seed: int, path: pathlib.Path) -> None:
    """A model directory for joint training: router rows drawn from N(0, 0.02^2), as joint training begins them."""
    generator = np.random.Generator(np.random.Philox([RANDOM_ROW_SEED + seed, len(config.owners)]))
    experts = {}
    for name, expert in params["experts"].items():
        row = generator.standard_normal(expert["router"].shape).astype(np.float32) * np.float32(0.02)
        experts[name] = {**expert, "router": row}
    release = open_model(public)
    record = release.manifests[PUBLIC].record.fields
    params = {**params, "experts": experts}
    create_model(path, params, config.model, release.tokenizer_path, dict.fromkeys(split(params), record), config.top_k)
