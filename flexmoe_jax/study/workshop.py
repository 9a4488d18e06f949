"""Trains or finds the models of one seed: a run that is done is skipped, one that was interrupted is resumed."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.model_dir import create_model, open_model
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.tune import Tuning, tune
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.embedding import DomainVector
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.data.writer import write_store
from flexmoe_jax.files import lock_directory, remove_directory
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.study.baselines import branch_train_mix
from flexmoe_jax.study.config import PUBLIC_FRACTION, Experts, StudyConfig
from flexmoe_jax.study.sharing import every, once
from flexmoe_jax.training.loop import train
from flexmoe_jax.tree import PUBLIC, Params, split

log = logging.getLogger(__name__)

RANDOM_ROW_SEED = 1000
ALL = "all"  # the text of every domain in equal amounts


@dataclasses.dataclass(frozen=True)
class Artifacts:
    """Model directories of one seed by the name of the system, `public` among them."""

    models: dict[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Joint:
    """A model trained further as a whole, on one text (a domain, or "all")."""

    text: str
    steps: int
    start: Callable[["Workshop", Artifacts], pathlib.Path]
    """Makes or finds the model directory that training starts from."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of its `RunConfig` beside those that every joint run has, and `groups`, that of its optimizer."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The merged model of the system `of` with its router tuned on proxies (paper section 3.3)."""

    of: str
    together: bool
    """Whether all rows are tuned at once, or each owner's by itself."""


Training = Experts | Joint | Tuned


def trained(name: str) -> Callable[["Workshop", Artifacts], pathlib.Path]:
    """A joint run's start: the model of the system `name`."""
    return lambda workshop, artifacts: artifacts.models[name]


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Trains or finds the models of one seed in `home`; `shared` holds what `make_shared` makes."""

    config: StudyConfig
    shared: pathlib.Path
    home: pathlib.Path
    seed: int
    rate: float = 1.5e-3
    """Peak learning rate of the trainings that `make` does."""

    def make(self, name: str, training: Training, artifacts: Artifacts) -> pathlib.Path:
        """The model directory of the system `name`; `artifacts` has the models that it is made from."""
        match training:
            case Experts():
                return self._merged(name, training, self.at_norm(artifacts.models[PUBLIC], training.router_scale))
            case Joint(text, steps, start, changes):
                options = {"public": str(start(self, artifacts)), "router_z_loss": 0.0, **changes}
                return self.train(name, owner=PUBLIC, text=text, steps=steps, **options)
            case Tuned(of, together):
                return self._tuned(name, artifacts.models[of], together)

    def runs(self, name: str, training: Training) -> dict[str, pathlib.Path]:
        """{text: run directory} of the runs that train the system `name`, without those of router tuning."""
        match training:
            case Experts():
                return {owner: self._run(_expert_of(name, owner)) for owner in self.config.owners}
            case Joint(text):
                return {text: self._run(name)}
        return {}

    def train(
        self, name: str, *, owner: str, text: str, steps: int, groups: str | None = None, **changes: Any
    ) -> pathlib.Path:
        """The product of a run on the mix's domain `text`, or on the folder `text` beside the mix.

        An owner's batches hold the same number of own sequences with public text beside them and without.
        """
        own = self.config.own_sequences if text in self.config.owners and "public_data" not in changes else None
        release = changes.get("public")
        folder = self.tokens(text, release) if release else text_folder(self.config, self.shared, text)
        options: dict[str, Any] = {
            "optimizer": OptimizerConfig(
                lr=self.rate, warmup_steps=min(10, steps // 10), weight_decay=0.1, groups=groups
            ),
            "out": str(self._run(name)),
            "batch_size": own or self.config.batch_size,
            "seq_len": self.config.seq_len,
            "compute_dtype": self.config.compute_dtype,
            "seed": self.seed,
            "save_every": 200 if steps > 200 else None,
            "eval_every": None,  # the held-out text is for the study's own scores
        }
        run = RunConfig(owner=owner, data=str(folder), steps=steps, **options | changes)
        product = self._run(name) / ("model" if run.is_public else "package")
        once(product, lambda _: train(run))
        states = [product.parent / name for name in ("checkpoints", "digests")]
        if any(folder.exists() for folder in states):  # with two moments they take several times what the run made
            with lock_directory(product.parent, ".lock"):
                for folder in states:
                    remove_directory(folder)
            log.info(f"seed {self.seed}: {name}: {product}")
        return product

    def tokens(self, text: str, release: pathlib.Path | str) -> pathlib.Path:
        """The token store of a text, which is made once for all runs beside the model directory `release`."""
        folder = text_folder(self.config, self.shared, text)

        def write(path: pathlib.Path) -> None:
            model = open_model(release)
            tokenizer = load_tokenizer(model.tokenizer_files).for_rows(model.config.vocab_size)
            write_store(read_documents(folder), tokenizer, path)

        store = self.shared / "tokens" / text
        once(store, write)
        return store

    def at_norm(self, release: pathlib.Path, scale: float | None) -> pathlib.Path:
        """`release` with router rows that start at the norm `scale`; itself where it has them, or for None."""
        if scale in (None, open_model(release).manifests[PUBLIC].record.fields["router"]["scale"]):
            return release
        return self.made(f"public, rows of norm {scale}", functools.partial(_rescale, release, scale))

    def made(self, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
        """What `make` writes at a path of its own, once; it must write whole or not at all."""
        path = self._made(name)
        once(path, make)
        return path

    def _merged(self, name: str, how: Experts, release: pathlib.Path) -> pathlib.Path:
        """Every owner's expert, and the model merged from them."""

        def package(i: int, owner: str) -> pathlib.Path:
            vector = self.shared / "domains" / f"{owner}.json"
            if how.random_rows:
                vector = self.made(f"random row {owner}.json", functools.partial(_random_row, vector, self.seed, i))
            options: dict[str, Any] = {
                "public": str(release),
                "domain_vector": str(vector),
                "coordinate": how.coordinate,
                "router_contrast": 0.1 if how.contrast else 0.0,
                "router": "generative" if how.generative else "trained",
                **({} if how.coordinate else {"router_z_loss": 0.0}),  # a router that chooses nothing
            }
            if how.public_text:
                public_text = str(self.tokens(PUBLIC, release))
                options |= {"public_data": public_text, "public_fraction": PUBLIC_FRACTION}
            options |= how.changes
            run = _expert_of(name, owner)
            return self.train(run, owner=owner, text=owner, steps=self.config.owner_steps, **options)

        packages = every(functools.partial(package, i, owner) for i, owner in enumerate(self.config.owners))
        return self.made(f"merged {name}", lambda path: merge(release, packages, path, top_k=self.config.top_k))

    def _tuned(self, name: str, model: pathlib.Path, together: bool) -> pathlib.Path:
        proxies = {owner: self.shared / "proxies" / owner for owner in self.config.owners}
        tuning = Tuning(
            together=together,
            seed=self.seed,
            batch_size=self.config.batch_size,
            seq_len=self.config.seq_len,
            lr=self.rate,
            compute_dtype=self.config.compute_dtype,
            steps=self.config.tune_steps,
        )
        public = text_folder(self.config, self.shared, PUBLIC)
        made = self._made(name)
        once(made / "model", lambda path: tune(model, proxies, public, made, tuning))
        return made / "model"

    def _run(self, name: str) -> pathlib.Path:
        return self.home / "runs" / folder_name(name)

    def _made(self, name: str) -> pathlib.Path:
        return self.home / "made" / folder_name(name)


def text_folder(config: StudyConfig, shared: pathlib.Path, text: str) -> pathlib.Path:
    """The folder of a text: a domain of the mix; `all` and public text of several domains are blended beside it."""
    blended = text == ALL or (text == PUBLIC and config.public_sources != (PUBLIC,))
    return shared / text if blended else shared / "mix" / text


def _expert_of(name: str, owner: str) -> str:
    return f"{name} {owner}"


def folder_name(name: str) -> str:
    """The name of a system's folder."""
    return re.sub("[,']", "", name).replace(" ", "_")


def btx_start(dense: Mapping[str, str]) -> Callable[[Workshop, Artifacts], pathlib.Path]:
    """The start of BTX's joint training: experts out of the dense systems `dense` {owner: name}."""

    def make(workshop: Workshop, artifacts: Artifacts) -> pathlib.Path:
        def write(path: pathlib.Path) -> None:
            sources = {PUBLIC: PUBLIC, **dense}
            paths = {expert: artifacts.models[name] for expert, name in sources.items()}
            models = {expert: load(path).params for expert, path in paths.items()}
            _write_joint(workshop, artifacts, branch_train_mix(models), path)

        return workshop.made("BTX start", write)

    return make


def upcycled(workshop: Workshop, artifacts: Artifacts) -> pathlib.Path:
    """As many copies of the public feed-forward network as the method has experts.

    Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055.
    """

    def write(path: pathlib.Path) -> None:
        params = load(artifacts.models[PUBLIC]).params
        experts = dict.fromkeys((PUBLIC, *workshop.config.owners), params["experts"][PUBLIC])
        _write_joint(workshop, artifacts, {**params, "experts": experts}, path)

    return workshop.made("upcycled", write)


def _write_joint(workshop: Workshop, artifacts: Artifacts, params: Params, path: pathlib.Path) -> None:
    """A model directory for joint training, with router rows from N(0, 0.02^2)."""
    config, release = workshop.config, open_model(artifacts.models[PUBLIC])
    generator = np.random.Generator(np.random.Philox([RANDOM_ROW_SEED + workshop.seed, len(config.owners)]))
    experts = {}
    for name, expert in params["experts"].items():
        row = generator.standard_normal(expert["router"].shape).astype(np.float32) * np.float32(0.02)
        experts[name] = {**expert, "router": row}
    parts = {**params, "experts": experts}
    records = dict.fromkeys(split(parts), release.manifests[PUBLIC].record.fields)
    create_model(path, parts, release.config, release.tokenizer_files, records, config.top_k)


def _random_row(vector: pathlib.Path, seed: int, owner: int, path: pathlib.Path) -> None:
    """A domain vector without the domain: a direction drawn at random."""
    true = DomainVector.load(vector)
    generator = np.random.Generator(np.random.Philox([RANDOM_ROW_SEED + seed, owner]))
    dataclasses.replace(true, vector=generator.standard_normal(true.vector.size).astype(np.float32)).save(path)


def _rescale(public: pathlib.Path, scale: float, path: pathlib.Path) -> None:
    """The release with its router row, and so those of all later experts, at another norm."""
    model, release = load(public), open_model(public)
    record = json.loads(json.dumps(release.manifests[PUBLIC].record.fields))
    expert = dict(model.params["experts"][PUBLIC])
    expert["router"] = np.asarray(expert["router"] * (scale / record["router"]["scale"]), np.float32)
    record["router"]["scale"] = scale
    params = {**model.params, "experts": {PUBLIC: expert}}
    create_model(path, params, model.config, release.tokenizer_files, dict.fromkeys(split(params), record))
