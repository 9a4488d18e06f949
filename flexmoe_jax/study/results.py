"""From scores to tables: bits per byte and choices with intervals, costs, and each system against the method."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from flexmoe_jax.api import load
from flexmoe_jax.artifacts.digest import write_json
from flexmoe_jax.config import differences, to_mapping
from flexmoe_jax.data.proxies import Classifier
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.study.choice import correct
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.details import compare_never_merged, curves, samples
from flexmoe_jax.study.intervals import Bootstrap, summary
from flexmoe_jax.study.plan import METHOD, OF_PUBLIC, OF_SHARED, make_shared, train_public, train_seed
from flexmoe_jax.study.scores import SystemScore, Texts, make_texts, score_seed
from flexmoe_jax.tree import PUBLIC


def reproduce(config: StudyConfig, report=lambda line: None, shared: pathlib.Path | None = None) -> dict:
    """Runs the study, or what is missing of it, in `config.out`; writes and returns `results.json`.

    `shared` is the folder of another study of the same domains, with its mix and domain vectors.
    """
    root = pathlib.Path(config.out)
    shared = root if shared is None else shared
    check_same(config, root)
    make_shared(config, shared)
    texts = make_texts(config, shared / "mix")
    public = train_public(config, shared, root, report)
    made, scores = [], []
    for seed in range(config.seeds):
        home = root / f"seed-{seed}"
        made.append(train_seed(config, shared, public, home, seed, report))
        scores.append(score_seed(config, made[-1], texts, home, report))
    results = tabulate(config, texts, scores, made[0].flops)
    results |= {
        "opting_out": [compare_never_merged(artefacts) for artefacts in made],
        "curves": curves([root / "runs", root / "seed-0" / "runs"]),
        "classifiers": _classifiers(config, shared),
    }
    # Held-out text stays in the study's folder: results may be published, news may not.
    write_json(root / "samples.json", samples(load(made[0].merged[METHOD]), texts))
    write_json(root / "results.json", results)
    return results


def vary(config: StudyConfig, key: str, values: Sequence[str], report=lambda line: None) -> dict[str, dict]:
    """{value: results} of the study at each value of one of its numbers: the method and its dense experts alone.

    Each is a study of its own in `config.out`/KEY-VALUE. They share the text and the public model where these do not
    depend on the number.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(StudyConfig) if field.type in (int, float)}
    if key not in kinds:
        raise ConfigError(f"config.{key} cannot be varied", did_you_mean(key, kinds))
    if config.public and key in ("public_steps", "public_share"):
        raise ConfigError(f"config.public is {config.public!r} and config.{key} is varied", "leave config.public out")
    root, base = pathlib.Path(config.out), dataclasses.replace(config, systems="method")
    try:
        changes: list[dict] = [{key: kinds[key](value), "out": str(root / f"{key}-{value}")} for value in values]
        studies = [dataclasses.replace(base, **change) for change in changes]
    except ValueError as error:
        raise ConfigError(f"{key} is varied over {', '.join(values)}: {error}", "give numbers") from error
    if key not in OF_PUBLIC:
        make_shared(base, root)
        public = str(train_public(base, root, root, report))
        studies = [dataclasses.replace(study, public=public) for study in studies]
    shared = None if key in OF_SHARED else root
    return {value: reproduce(study, report, shared) for value, study in zip(values, studies, strict=True)}


def check_same(config: StudyConfig, root: pathlib.Path) -> None:
    """Refuses a folder that holds another study: what is cached there would be taken for this one's.

    More seeds may be added, other ablations, and more systems.
    """
    path, fields = root / "study.json", to_mapping(config)
    fields = {key: value for key, value in fields.items() if key not in ("out", "seeds", "ablations", "systems")}
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, fields)
    elif lines := differences(json.loads(path.read_text()), fields):
        raise ArtifactError(
            f"{root} holds another study (there != now):\n    " + "\n    ".join(lines), "give another config.out"
        )


def tabulate(config: StudyConfig, texts: Texts, scores: list[dict[str, SystemScore]], flops: dict[str, float]) -> dict:
    """The tables as JSON values: each figure with its 95% interval over seeds and documents."""
    domains = (PUBLIC, *config.owners)
    bytes_D = {domain: np.array([len(t.encode()) for t in some]) for domain, some in texts.heldout.items()}
    bits = Bootstrap(len(scores), {domain: len(b) for domain, b in bytes_D.items()})
    items = {domain: len(texts.choice[domain]) // 4 for domain in domains}
    choices = Bootstrap(len(scores), items)
    bpb_R: dict[str, dict] = {}
    right_R: dict[str, dict] = {}
    for system in scores[0]:
        nats = {key: [_totals(seed[system].nats[key]) for seed in scores] for key in scores[0][system].nats}
        bpb_R[system] = {d: bits.ratio(d, np.array(nats[d, "heldout"]) / math.log(2), b) for d, b in bytes_D.items()}
        bpb_R[system]["mean"] = np.mean([bpb_R[system][domain] for domain in domains], axis=0)
        right_R[system] = {
            d: choices.ratio(d, [correct(n) for n in nats[d, "choice"]], np.ones(count)) for d, count in items.items()
        }
        right_R[system]["mean"] = np.mean([right_R[system][domain] for domain in domains], axis=0)
    shares = {s: score.share for s, score in scores[0].items() if score.share}
    return {
        "config": to_mapping(config),
        "documents": {d: {"documents": len(b), "bytes": int(b.sum())} for d, b in bytes_D.items()},
        "choice_items": items,
        "bits_per_byte": {s: {d: summary(v) for d, v in row.items()} for s, row in bpb_R.items()},
        "against_method": {
            s: {d: summary(v - bpb_R[METHOD][d]) for d, v in row.items()} for s, row in bpb_R.items() if s != METHOD
        },
        "choice": {s: {d: summary(v) for d, v in row.items()} for s, row in right_R.items()},
        "forward_flops_per_token": {s: score.forward_flops for s, score in scores[0].items()},
        "training_flops_after_public": flops,
        "share": {s: {d: v.tolist() for d, v in share.items()} for s, share in shares.items()},
    }


def _classifiers(config: StudyConfig, root: pathlib.Path) -> dict[str, float]:
    """Each owner's classifier's accuracy on documents it was not trained on, where there are classifiers."""
    paths = {owner: root / "domains" / f"{owner}_classifier.json" for owner in config.owners}
    return {owner: Classifier.load(path).accuracy for owner, path in paths.items() if path.exists()}


def _totals(nats) -> np.ndarray:
    return np.array([doc.sum(dtype=np.float64) for doc in nats])
