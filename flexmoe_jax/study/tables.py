"""From scores to results: bits per byte with intervals; curves, opt-outs, sample texts."""

import json
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmoe_jax.api import Model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.data.proxies import Classifier
from flexmoe_jax.study.baselines import Nats
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.intervals import Bootstrap, summary
from flexmoe_jax.study.results import MEAN, Curve, SystemResult
from flexmoe_jax.study.scoring import SystemScore, Texts
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.workshop import Artifacts, Workshop
from flexmoe_jax.tree import PUBLIC

SAMPLE_TOKENS = 120


def tabulate(config: StudyConfig, texts: Texts, scores: Sequence[dict[str, SystemScore]]) -> list[SystemResult]:
    """A row for each system of `scores` (one mapping per seed), every figure with its 95% interval."""
    bytes_D = {domain: np.array([len(text.text.encode()) for text in some]) for domain, some in texts.items()}
    bits = Bootstrap(len(scores), {domain: len(sizes) for domain, sizes in bytes_D.items()})
    bits_R: dict[str, dict[str, np.ndarray]] = {}
    for name in scores[0]:
        nats = {domain: [_totals(seed[name].nats[domain]) for seed in scores] for domain in texts}
        bits_R[name] = {d: bits.ratio(d, np.array(nats[d]) / math.log(2), b) for d, b in bytes_D.items()}
        bits_R[name][MEAN] = np.mean([bits_R[name][domain] for domain in (PUBLIC, *config.owners)], axis=0)
    return [
        SystemResult(
            name=system.name,
            kind=system.kind,
            experts=list(system.experts),
            bits_per_byte={d: summary(values_R) for d, values_R in bits_R[system.name].items()},
            against_method={d: summary(values_R - bits_R[METHOD][d]) for d, values_R in bits_R[system.name].items()}
            if system.name != METHOD
            else {},
            forward_flops_per_token=system.forward_flops(config),
            training_flops_after_public=system.training_flops,
            share={d: share_LE.tolist() for d, share_LE in scores[0][system.name].share.items()},
        )
        for system in systems(config)
        if system.name in scores[0]
    ]


def document_sizes(texts: Texts) -> dict[str, dict[str, int]]:
    """{domain: how many `documents` and `bytes` of held-out text}."""
    return {
        domain: {"documents": len(some), "bytes": sum(len(text.text.encode()) for text in some)}
        for domain, some in texts.items()
    }


def compare_never_merged(artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """{owner: digests of the method's model after its opt-out and of one merged without it}; equal if exact."""
    model = open_model(artifacts.models[METHOD])
    result = {}
    for owner in (name for name in model.experts if name != PUBLIC):
        with tempfile.TemporaryDirectory() as folder:
            rest = [model.package(name) for name in model.experts if name not in (PUBLIC, owner)]
            left = opt_out(model.path, owner, pathlib.Path(folder, f"without-{owner}"))
            path = pathlib.Path(folder, f"never-{owner}")
            never = merge(artifacts.models[PUBLIC], rest, path, top_k=left.wanted_top_k)
            result[owner] = {"left": left.digest, "never": never.digest, "equal": left.digest == never.digest}
    return result


def curves(config: StudyConfig, root: pathlib.Path) -> list[Curve]:
    """Training losses of the public model and of every run with the first seed, without steps that have none."""
    workshop = Workshop(config, root, root / "seed-0", 0)
    runs = [(PUBLIC, PUBLIC, root / "runs" / PUBLIC)]
    for system in systems(config):
        if system.training is not None:
            runs += [(system.name, text, path) for text, path in workshop.runs(system.name, system.training).items()]
    files = [(name, text, path / "metrics.jsonl") for name, text, path in runs]
    return [Curve(name, text, _losses(file)) for name, text, file in files if file.exists()]


def _losses(metrics: pathlib.Path) -> list[list[float]]:
    rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [[row["step"], round(row["loss"], 4)] for row in rows if row.get("loss") is not None]


def samples(model: Model, heldout: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The start of a document of every domain: its tokens, and each expert's weight averaged over layers."""
    rows = []
    for domain, documents in heldout.items():
        routing = model.routing(next((text for text in documents if len(text) > 600), documents[0]))
        weights_TE = routing.weights_LTE.mean(0)[:SAMPLE_TOKENS]
        rows.append(
            {
                "domain": domain,
                "experts": list(model.experts),
                "pieces": routing.pieces[:SAMPLE_TOKENS],
                "weights": [[round(float(weight), 3) for weight in row] for row in weights_TE],
            }
        )
    return rows


def classifiers(config: StudyConfig, shared: pathlib.Path) -> dict[str, float]:
    """Each owner's classifier's accuracy on documents it was not trained on, where there are classifiers."""
    paths = {owner: shared / "domains" / f"{owner}_classifier.json" for owner in config.owners}
    return {owner: Classifier.load(path).accuracy for owner, path in paths.items() if path.exists()}


def _totals(nats: Nats) -> np.ndarray:
    return np.array([doc.sum(dtype=np.float64) for doc in nats])
