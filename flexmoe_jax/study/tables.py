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
from flexmoe_jax.study.intervals import Interval, Sample, weighted_sum
from flexmoe_jax.study.results import MEAN, PUBLIC_TEXT, Curve, Regret, SystemResult, hybrid_of
from flexmoe_jax.study.scoring import SystemScore, Text
from flexmoe_jax.study.systems import METHOD, systems
from flexmoe_jax.study.workshop import Artifacts, Workshop
from flexmoe_jax.tree import PUBLIC

SAMPLE_TOKENS = 120


def tabulate(
    config: StudyConfig, texts: Mapping[str, Sequence[Text]], scores: Sequence[dict[str, SystemScore]]
) -> list[SystemResult]:
    """A row for each system of `scores` (one mapping per seed), every figure with its 95% interval."""
    table = _Table(config, texts, scores)
    return [
        SystemResult(
            name=system.name,
            kind=system.kind,
            experts=list(system.experts),
            sees_text=system.sees_text,
            bits_per_byte=table.row(system.name),
            against_method=table.row(system.name, METHOD) if system.name != METHOD else {},
            forward_flops_per_token=system.forward_flops(config),
            training_flops_after_public=system.training_flops,
            chosen={d: [seed[system.name].chosen[d] for seed in scores] for d in scores[0][system.name].chosen},
            share={d: share_LE.tolist() for d, share_LE in scores[0][system.name].share.items()},
        )
        for system in systems(config)
        if system.name in scores[0]
    ]


def regret(
    config: StudyConfig, texts: Mapping[str, Sequence[Text]], scores: Sequence[dict[str, SystemScore]]
) -> list[Regret]:
    """What joining costs or gives each owner, on its own text, in the merged models as owners join in their order.

    A row with `PUBLIC` in the place of the owner is what the merge does to the public text.
    """
    table, rows = _Table(config, texts, scores), []
    joined: dict[tuple[str, ...], str] = {}
    for system in systems(config):
        if system.experts and system.experts[1:] == config.owners[: len(system.experts) - 1]:
            joined.setdefault(system.experts, system.name)
    for experts, name in sorted(joined.items(), key=lambda item: len(item[0])):
        rows.append(Regret(name, PUBLIC, None, table.cell(table.public_text, name, PUBLIC)))
        for owner in experts[1:]:
            alone = table.cell(owner, name, PUBLIC)
            rows.append(Regret(name, owner, table.cell(owner, name, hybrid_of(owner)), alone))
    return rows


class _Table:
    """Bits of every system on the same texts: `row` gives intervals, by domain and for `MEAN`."""

    def __init__(
        self, config: StudyConfig, texts: Mapping[str, Sequence[Text]], scores: Sequence[dict[str, SystemScore]]
    ) -> None:
        self.bytes = {d: np.array([len(text.text.encode()) for text in some]) for d, some in texts.items()}
        self.groups = {domain: [text.group for text in some] for domain, some in texts.items()}
        self.bits = {
            name: {d: np.array([_bits(seed[name].nats[d]) for seed in scores]) for d in texts} for name in scores[0]
        }
        self.columns = {domain: {domain: 1.0} for domain in texts}
        self.public_text = PUBLIC
        public = dict.fromkeys(config.public_sources, 1 / len(config.public_sources))
        if len(public) > 1:
            self.public_text = PUBLIC_TEXT
            self.columns[PUBLIC_TEXT] = public
        each = 1 / (1 + len(config.owners))  # public text counts once in the mean, however many sources it has
        self.columns[MEAN] = {s: each * share for s, share in public.items()} | dict.fromkeys(config.owners, each)

    def row(self, name: str, other: str | None = None) -> dict[str, Interval]:
        """Every column of the system `name`, or of its differences from `other`."""
        return {column: self.cell(column, name, other) for column in self.columns}

    def cell(self, column: str, name: str, other: str | None = None) -> Interval:
        """One column of a row."""
        samples, weights = [], self.columns[column]
        for domain in weights:
            bits_SD = self.bits[name][domain] - (0 if other is None else self.bits[other][domain])
            samples.append(Sample(bits_SD, self.bytes[domain], self.groups[domain]))
        return weighted_sum(samples, list(weights.values()))


def document_sizes(texts: Mapping[str, Sequence[Text]]) -> dict[str, dict[str, int]]:
    """{domain: how many `documents`, `groups` of documents and `bytes` of held-out text}."""
    return {
        domain: {
            "documents": len(some),
            "groups": len({text.group for text in some}),
            "bytes": sum(len(text.text.encode()) for text in some),
        }
        for domain, some in texts.items()
    }


def compare_never_merged(artifacts: Artifacts, owner: str) -> dict[str, Any]:
    """Digests of the method's model after an owner's opt-out and of one merged without it; `equal` if exact."""
    model = open_model(artifacts.models[METHOD])
    with tempfile.TemporaryDirectory() as folder:
        rest = [model.package(name) for name in model.experts if name not in (PUBLIC, owner)]
        left = opt_out(model.path, owner, pathlib.Path(folder, f"without-{owner}"))
        path = pathlib.Path(folder, f"never-{owner}")
        never = merge(artifacts.models[PUBLIC], rest, path, top_k=left.wanted_top_k)
        return {"left": left.digest, "never": never.digest, "equal": left.digest == never.digest}


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


def _bits(nats: Nats) -> np.ndarray:
    """Bits of each document, float64 [D]."""
    return np.array([doc.sum(dtype=np.float64) for doc in nats]) / math.log(2)
