"""Training of a study: the text and vectors that all seeds share, the public model, and what one seed adds."""

import dataclasses
import functools
import pathlib

from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.artifacts.sealed import differences
from flexmoe_jax.data.embedding import DomainVector
from flexmoe_jax.data.sources import blend
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.hf.anchors import ANCHORS, open_anchor
from flexmoe_jax.hf.load import import_model
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.rates import find_rate
from flexmoe_jax.study.sharing import every
from flexmoe_jax.study.systems import systems
from flexmoe_jax.study.workshop import ALL, Artifacts, Training, Workshop, text_folder
from flexmoe_jax.tree import PUBLIC

OF_SHARED = ("public_share", "embed_count")  # keys that the text and the domain vectors depend on
OF_PUBLIC = (*OF_SHARED, "public_steps", "batch_size", "seq_len")  # keys that the public model depends on


def make_shared(config: StudyConfig, shared: pathlib.Path) -> None:
    """The mix, vectors of the public text and of each owner's, each owner's proxies, and texts blended of domains.

    Owners' classifiers are trained here for all owners at once; an owner trains one with `flexmoe train-classifier`.
    """
    from flexmoe_jax.data.embedding import domain_vector
    from flexmoe_jax.data.proxies import find_proxies, train_classifier
    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.flexmix.build import build

    mix, public = shared / "mix", text_folder(config, shared, PUBLIC)
    build(mix, domains=(*config.public_sources, *config.owners), public_share=config.public_share)
    if public.parent != mix:
        blend([mix / name for name in config.public_sources], public / "train.jsonl")
    for name in (PUBLIC, *config.owners):
        path = shared / "domains" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            documents = read_documents(text_folder(config, shared, name), "train")
            domain_vector(documents, count=config.embed_count).save(path)
    if config.systems == "method":
        return
    proxies = shared / "proxies"
    classifiers = {}
    for owner in (owner for owner in config.owners if not (proxies / owner).exists()):
        own = read_documents(mix / owner)
        classifiers[owner] = train_classifier(own, read_documents(public), count=config.classifier_documents)
        classifiers[owner].save(shared / "domains" / f"{owner}_classifier.json")
    if classifiers:
        find_proxies(classifiers, read_documents(public), proxies, count=config.proxies, of=config.proxies_of)
    blend([public, *(mix / owner for owner in config.owners)], shared / ALL / "train.jsonl")


def train_public(config: StudyConfig, shared: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
    """The public model from which every seed starts: given, imported, trained or found.

    Raises ConfigError where a given one has another shape than `config.model`.
    """
    if config.public is not None:
        public = pathlib.Path(config.public)
        if config.public in ANCHORS:
            vector = shared / "domains" / f"{PUBLIC}.json"
            make = functools.partial(_import_anchor, config.public, vector)
            public = Workshop(config, shared, home, 0).made(config.public, make)
        given = open_model(public).config
        if lines := differences(to_mapping(given), to_mapping(config.model or given)):
            what = f"config.public has another shape than config.model: {', '.join(lines)}"
            raise ConfigError(what, "set config.model to none: the shape is that of config.public")
        return public
    return Workshop(config, shared, home, 0).train(
        PUBLIC,
        owner=PUBLIC,
        text=PUBLIC,
        model=config.model,
        steps=config.public_steps,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=20, weight_decay=0.1),
        router_z_loss=0.0,
        domain_vector=str(shared / "domains" / f"{PUBLIC}.json"),
    )


def _import_anchor(name: str, vector: pathlib.Path, path: pathlib.Path) -> None:
    """An anchor as a model directory whose router row starts from the vector of the public text."""
    with open_anchor(name) as source:
        import_model(source, path, domain=DomainVector.load(vector), licence=ANCHORS[name].licence)


def train_seed(
    config: StudyConfig, shared: pathlib.Path, public: pathlib.Path, home: pathlib.Path, seed: int, made: Artifacts
) -> None:
    """Trains every system of the table that is trained, at its rate, into `made`; what is there already is kept.

    Raises BusyError in the end where another process is training some.
    """
    workshop = Workshop(config, shared, home, seed)
    if PUBLIC not in made.models:
        made.models[PUBLIC] = workshop.at_norm(public, config.router_scale)
    trainings = {system.name: system.training for system in systems(config) if system.training is not None}

    def add(name: str, training: Training) -> None:
        rate = find_rate(name, trainings, workshop, made)
        made.models[name] = dataclasses.replace(workshop, rate=rate).make(name, training, made)

    every(functools.partial(add, *item) for item in trainings.items() if item[0] not in made.models)
