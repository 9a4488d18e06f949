"""What one seed of the study trains: the method, its ablations and its baselines, each a run of the ordinary loop.

Every run has a folder of its own and is skipped or resumed when it is there. `Artefacts` says what each one made.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from flexmoe_jax.config import OptimizerConfig
from flexmoe_jax.data.sources import blend
from flexmoe_jax.model.flops import training_flops
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.runs import Runs, btx_start, upcycled
from flexmoe_jax.tree import PUBLIC

METHOD = "FlexMoE"
ALONE, TOGETHER = f"{METHOD}, tuned alone", f"{METHOD}, tuned together"
FITTED = f"{METHOD}, biases fitted on public text"
OF_SHARED = ("public_share", "embed_count")  # numbers that the text and the domain vectors depend on
OF_PUBLIC = (*OF_SHARED, "public_steps", "batch_size", "seq_len")  # numbers that the public model depends on
ALL_BUT_BIASES = "trunk/.*|experts/public/.*|experts/.*/(router|w_.*)"


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """Model directories by name: the merged models of the method and its ablations, dense experts (all parameters
    trained, and with the trunk `frozen`: the feed-forward network alone), joint models.

    `flops` are training operations of each, counted after the public model they all begin with.
    """

    public: pathlib.Path
    merged: dict[str, pathlib.Path]
    dense: dict[str, pathlib.Path]
    frozen: dict[str, pathlib.Path]
    joint: dict[str, pathlib.Path]
    flops: dict[str, float]


def train_public(config: StudyConfig, shared: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
    """The public model every seed begins with, trained or found: as in the paper, there is one."""
    if config.public:
        return pathlib.Path(config.public)
    return Runs(config, shared, home, 0).train(
        "public", owner=PUBLIC, data=PUBLIC, model=config.model, steps=config.public_steps,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20, weight_decay=0.1), router_z_loss=0.0,
        domain_vector=str(shared / "domains" / "public.json"),
    )  # fmt: skip


def train_seed(
    config: StudyConfig, shared: pathlib.Path, public: pathlib.Path, home: pathlib.Path, seed: int
) -> Artefacts:
    """Trains what is not there yet. `shared` holds what `make_shared` makes."""
    runs, costs = Runs(config, shared, home, seed), _Costs(config)
    public = runs.at_norm(public, config.router_scale)
    merged = {METHOD: runs.merged(METHOD, public, {}, False)}
    flops = {METHOD: costs.owners("expert"), "dense": costs.owners("joint"), "frozen trunk": costs.owners("alone")}
    go_on: dict[str, Any] = {"owner": PUBLIC, "public": str(public), "router_z_loss": 0.0}
    dense = {o: runs.train(f"dense {o}", data=o, steps=config.owner_steps, **go_on) for o in config.owners}
    go_on_frozen = {**go_on, "freeze": "trunk/.*"}
    frozen = {
        o: runs.train(f"frozen trunk {o}", data=o, steps=config.owner_steps, **go_on_frozen) for o in config.owners
    }
    if config.systems == "method":
        return Artefacts(public, merged, dense, frozen, {}, flops)
    for name, (changes, random_rows, scale) in config.chosen_ablations.items():
        merged[name] = runs.merged(name, runs.at_norm(public, scale), changes, random_rows)
        flops[name] = costs.owners("expert" if changes.get("coordinate", True) else "alone")
    for name in (ALONE, TOGETHER):
        merged[name] = runs.tuned(name, merged[METHOD], name == TOGETHER)
    merged[FITTED] = runs.train(
        FITTED, data="public", steps=config.tune_steps, freeze=ALL_BUT_BIASES, **go_on | {
            "public": str(merged[METHOD]), "top_k": config.top_k,
            "optimizer": OptimizerConfig(lr=2e-2, warmup_steps=5),
        },
    )  # fmt: skip
    flops[ALONE] = flops[METHOD] + len(config.owners) * costs.steps(config.tune_steps, "expert")
    flops[TOGETHER] = flops[FITTED] = flops[METHOD] + costs.steps(config.tune_steps, "joint", config.top_k)

    together = {**go_on, "top_k": config.top_k, "load_balance": 0.01, "router_z_loss": 1e-3}
    start = runs.made("BTX start", functools.partial(btx_start, config, public, dense, seed))
    joint = {"BTX": runs.train("BTX", data="public", steps=config.mix_steps, **together | {"public": str(start)})}
    flops["BTX"] = flops["dense"] + costs.steps(config.mix_steps, "joint", config.top_k)
    start = runs.made("upcycled", functools.partial(upcycled, config, public, seed))
    for times in (1, 2):
        steps = max(1, round(times * flops[METHOD] / costs.steps(1, "joint", config.top_k)))
        name = f"unrestricted {times}x"
        joint[name] = runs.train(name, data="all", steps=steps, **together | {"public": str(start)})
        flops[name] = costs.steps(steps, "joint", config.top_k)
    return Artefacts(public, merged, dense, frozen, joint, flops)


@dataclasses.dataclass(frozen=True)
class _Costs:
    """Operations of training, by kind of step (model/flops.py)."""

    config: StudyConfig

    def steps(self, count: int, kind: str, active: int = 1) -> float:
        tokens = self.config.batch_size * self.config.seq_len
        return count * tokens * training_flops(self.config.model, self.config.seq_len, kind, active)

    def owners(self, kind: str) -> float:
        return len(self.config.owners) * self.steps(self.config.owner_steps, kind)


def make_shared(config: StudyConfig, shared: pathlib.Path) -> None:
    """The mix, a domain vector of each domain, proxies of each owner, and `all/`: equal amounts of every domain's text.

    Owners' classifiers are made here for all owners at once; the owners' command is `flexmoe train-classifier`.
    """
    from flexmoe_jax.data.embedding import domain_vector
    from flexmoe_jax.data.proxies import find_proxies, train_classifier
    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.flexmix.build import build

    names = (PUBLIC, *config.owners)
    build(shared / "mix", domains=names, public_share=config.public_share)
    for name in names:
        path = shared / "domains" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            documents = read_documents(shared / "mix" / name, "train")
            domain_vector(documents, count=config.embed_count).save(path)
    if config.systems == "method":
        return
    public, count = shared / "mix" / PUBLIC, config.classifier_documents
    for owner in config.owners:
        if not (shared / "proxies" / owner).exists():
            own = read_documents(shared / "mix" / owner)
            classifier = train_classifier(own, read_documents(public), count=count)
            classifier.save(shared / "domains" / f"{owner}_classifier.json")
            find_proxies({owner: classifier}, read_documents(public), shared / "proxies", count=config.proxies,
                         of=config.proxies_of)  # fmt: skip
    blend([shared / "mix" / name for name in names], shared / "all" / "train.jsonl")
