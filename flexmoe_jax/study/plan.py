"""What one seed of the study trains: the method, its ablations and its baselines, each a run of the ordinary loop.

Every run has a folder of its own and is skipped or resumed when it is there. `Artefacts` says what each one made.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.model_dir import create_public_model, open_model
from flexmoe_jax.compose.average import branch_train_mix
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.config import ModelConfig, OptimizerConfig, RunConfig
from flexmoe_jax.data.domains import DomainVector
from flexmoe_jax.data.flexmix import DOMAINS
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.flops import training_flops
from flexmoe_jax.train.loop import train
from flexmoe_jax.tree import PUBLIC, TRUNK, Params

RANDOM_ROW_SEED = 1000
PAPER = {"public_data": "", "public_fraction": 0.0, "router_contrast": 0.0}
# name: (changes to an owner's run, random router rows, norm of the rows or None for the release's own)
ABLATIONS: dict[str, tuple[dict, bool, float | None]] = {
    "the paper's training": (PAPER, False, 1.0),
    "no coordination": ({**PAPER, "coordinate": False, "router_z_loss": 0.0}, False, None),
    "random rows": ({}, True, None),
    "no bias": ({"freeze": "experts/.*/bias"}, False, None),
    "no bias, random rows": ({"freeze": "experts/.*/bias"}, True, None),
}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The size of a study. `domains` are the closed ones, comma-separated; steps are of one run of each kind.

    `ablations` are names of `ABLATIONS`, comma-separated, or "all". Held-out text is in bytes per domain.
    """

    out: str
    domains: str
    model: ModelConfig
    seeds: int = 3
    public_steps: int = 300
    owner_steps: int = 100
    mix_steps: int = 100
    batch_size: int = 8
    seq_len: int = 256
    top_k: int = 2
    embed_count: int = 256
    classifier_documents: int = 256
    heldout_bytes: int = 40_000
    choice_items: int = 24
    ablations: str = "all"

    def __post_init__(self):
        for name in ("seeds", "public_steps", "owner_steps", "mix_steps", "batch_size", "heldout_bytes", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name} is {getattr(self, name)}", "give a number of at least 1")
        for owner in self.owners:
            if owner == PUBLIC or owner not in DOMAINS:
                raise ConfigError(f"config.domains names {owner!r}", f"choose from: {', '.join(DOMAINS[1:])}")
        if self.top_k > len(self.owners) + 1:
            raise ConfigError(
                f"config.top_k is {self.top_k}, the model has {len(self.owners) + 1} experts", "set config.top_k lower"
            )

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(sorted(self.domains.split(",")))

    @property
    def chosen_ablations(self) -> tuple[str, ...]:
        names = tuple(ABLATIONS) if self.ablations == "all" else tuple(filter(None, self.ablations.split(",")))
        for name in names:
            if name not in ABLATIONS:
                raise ConfigError(f"config.ablations names {name!r}", f"choose from: {', '.join(ABLATIONS)}")
        return names


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """Model directories by name: the merged models of the method and its ablations, dense experts, joint models.

    `flops` are training operations of each, counted after the public model they all begin with.
    """

    public: pathlib.Path
    merged: dict[str, pathlib.Path]
    dense: dict[str, pathlib.Path]
    joint: dict[str, pathlib.Path]
    flops: dict[str, float]


METHOD = "FlexMoE"


def train_seed(config: StudyConfig, shared: pathlib.Path, home: pathlib.Path, seed: int, report) -> Artefacts:
    """Trains what is not there yet. `shared` holds `mix/`, `domains/NAME.json` and `all/` (make_shared)."""
    runs = _Runs(config, shared, home, seed, report)
    public = runs.train("public", owner=PUBLIC, data="public", model=config.model, steps=config.public_steps,
                        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20, weight_decay=0.1), router_z_loss=0.0,
                        domain_vector=str(shared / "domains" / "public.json"))  # fmt: skip
    merged = {METHOD: runs.merged(METHOD, public, {}, False)}
    for name in config.chosen_ablations:
        changes, random_rows, scale = ABLATIONS[name]
        release = public
        if scale is not None:
            release = runs.made(f"public, rows of norm {scale}", functools.partial(_rescale, public, scale))
        merged[name] = runs.merged(name, release, changes, random_rows)
    go_on: dict[str, Any] = {"owner": PUBLIC, "public": str(public), "router_z_loss": 0.0}
    dense = {o: runs.train(f"dense {o}", data=o, steps=config.owner_steps, **go_on) for o in config.owners}

    T, B = config.seq_len, config.batch_size
    operations = {kind: training_flops(config.model, T, kind) * T * B for kind in ("expert", "alone", "joint")}
    sparse = training_flops(config.model, T, "joint", config.top_k) * T * B
    owners = len(config.owners) * config.owner_steps * operations["expert"]
    flops = dict.fromkeys(merged, owners)
    flops["dense"] = len(config.owners) * config.owner_steps * operations["joint"]
    if "no coordination" in flops:
        flops["no coordination"] = len(config.owners) * config.owner_steps * operations["alone"]
    flops["BTX"] = flops["dense"] + config.mix_steps * sparse

    joint = {}
    together = {**go_on, "top_k": config.top_k, "load_balance": 0.01, "router_z_loss": 1e-3}
    start = runs.made("BTX start", functools.partial(_btx_start, config, public, dense, seed))
    joint["BTX"] = runs.train("BTX", data="public", steps=config.mix_steps, **together | {"public": str(start)})
    start = runs.made("upcycled", functools.partial(_upcycled, config, public, seed))
    for times in (1, 2):
        name, steps = f"unrestricted {times}x", max(1, round(times * owners / sparse))
        joint[name] = runs.train(name, data="all", steps=steps, **together | {"public": str(start)})
        flops[name] = steps * sparse
    return Artefacts(public, merged, dense, joint, flops)


@dataclasses.dataclass(frozen=True)
class _Runs:
    config: StudyConfig
    shared: pathlib.Path
    home: pathlib.Path
    seed: int
    report: Callable[[str], None]

    def train(self, name: str, *, data: str, steps: int, **changes) -> pathlib.Path:
        """The product of a run, trained or found; `data` is a domain of the mix, or "all"."""
        folder = self.shared / "all" if data == "all" else self.shared / "mix" / data
        options: dict[str, Any] = {
            "optimizer": OptimizerConfig(lr=1.5e-3, warmup_steps=10, weight_decay=0.1),
            "out": str(self.home / "runs" / name.replace(" ", "_").replace(",", "").replace("'", "")),
            "batch_size": self.config.batch_size,
            "seq_len": self.config.seq_len,
            "seed": self.seed,
            "save_every": 200,
        }
        product = train(RunConfig(data=str(folder), steps=steps, **options | changes))
        self.report(f"seed {self.seed}: {name}: {product}")
        return product

    def merged(self, name: str, release: pathlib.Path, changes: dict, random_rows: bool) -> pathlib.Path:
        """Every owner's expert, trained with `changes`, and the model merged of them."""
        packages = []
        for i, owner in enumerate(self.config.owners):
            vector = self.shared / "domains" / f"{owner}.json"
            if random_rows:
                make = functools.partial(_random_row, vector, self.seed, i)
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

    def made(self, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
        """What `make` writes at a path of its own, once; it must write whole or not at all."""
        path = self.home / "made" / name.replace(" ", "_").replace(",", "").replace("'", "")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path


def make_shared(config: StudyConfig, shared: pathlib.Path) -> None:
    """The mix, a domain vector of each domain, and `all/`: as much text of every domain as the smallest has."""
    from flexmoe_jax.data.domains import domain_vector
    from flexmoe_jax.data.flexmix import build
    from flexmoe_jax.data.sources import read_documents

    names = (PUBLIC, *config.owners)
    build(shared / "mix", domains=names)
    for name in names:
        path = shared / "domains" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            documents = read_documents(shared / "mix" / name, "train")
            domain_vector(documents, count=config.embed_count).save(path)
    target = shared / "all" / "train.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [shared / "mix" / name / "train.jsonl" for name in names]
        smallest = min(path.stat().st_size for path in files)
        partial = target.with_suffix(".partial")
        partial.write_bytes(b"".join(_first_lines(path, smallest) for path in files))
        partial.rename(target)


def _first_lines(path: pathlib.Path, size: int) -> bytes:
    raw = path.read_bytes()[:size]
    return raw[: raw.rfind(b"\n") + 1]


def _random_row(vector: pathlib.Path, seed: int, owner: int, path: pathlib.Path) -> None:
    """A domain vector without the domain: a direction drawn at random."""
    true = DomainVector.load(vector)
    generator = np.random.Generator(np.random.Philox([RANDOM_ROW_SEED + seed, owner]))
    dataclasses.replace(true, vector=generator.standard_normal(true.vector.size).astype(np.float32)).save(path)


def _rescale(public: pathlib.Path, scale: float, path: pathlib.Path) -> None:
    """The release with its router row, and so every owner's to come, at another norm."""
    model, release = load(public), open_model(public)
    record = json.loads(json.dumps(release.manifests[PUBLIC].record))
    expert = dict(model.params["experts"][PUBLIC])
    expert["router"] = np.asarray(expert["router"] * (scale / record["router"]["scale"]), np.float32)
    record["router"]["scale"] = scale
    create_public_model(path, model.params[TRUNK], expert, model.config, release.tokenizer_path, record)


def _btx_start(config: StudyConfig, public: pathlib.Path, dense: dict, seed: int, path: pathlib.Path) -> None:
    models = {name: load(folder).params for name, folder in {PUBLIC: public, **dense}.items()}
    _write_joint(config, public, branch_train_mix(models), seed, path)


def _upcycled(config: StudyConfig, public: pathlib.Path, seed: int, path: pathlib.Path) -> None:
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
    create_public_model(
        path, params[TRUNK], experts.pop(PUBLIC), config.model, release.tokenizer_path,
        dict(release.manifests[PUBLIC].record), others=experts, top_k=config.top_k,
    )  # fmt: skip
