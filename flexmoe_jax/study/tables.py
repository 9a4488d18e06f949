"""From scores to tables: bits per byte and choices with intervals, costs, and each system against the method; curves,
routed sample texts, and opt-outs against models never merged.
"""

import json
import math
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np

from flexmoe_jax.api import Model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.config import to_mapping
from flexmoe_jax.data.proxies import Classifier
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.continuation import correct
from flexmoe_jax.study.intervals import Bootstrap, summary
from flexmoe_jax.study.systems import SystemScore, Texts
from flexmoe_jax.study.train import METHOD, Artefacts
from flexmoe_jax.tree import PUBLIC

SAMPLE_TOKENS = 120


def compare_never_merged(artefacts: Artefacts) -> dict[str, dict]:
    """{owner: digests of the model it left and of one merged without it}, of the method's model; equal if exact."""
    model = open_model(artefacts.merged[METHOD])
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for owner in (name for name in model.experts if name != PUBLIC):
            rest = [model.package(name) for name in model.experts if name not in (PUBLIC, owner)]
            left = opt_out(model.path, owner, pathlib.Path(folder, f"without-{owner}"))
            never = merge(artefacts.public, rest, pathlib.Path(folder, f"never-{owner}"), top_k=left.wanted_top_k)
            result[owner] = {"left": left.digest, "never": never.digest, "equal": left.digest == never.digest}
    return result


def curves(folders: Iterable[pathlib.Path]) -> dict[str, list[list[float]]]:
    """{run: [[step, loss], ...]} of the run directories in these folders; steps without a finite loss are left out."""
    found = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.parent.name] = [[row["step"], round(row["loss"], 4)] for row in rows if row["loss"] is not None]
    return found


def samples(model: Model, texts: Texts) -> list[dict]:
    """The beginning of a held-out document of every domain: its tokens, and each expert's mean weight over layers."""
    rows = []
    for domain, documents in texts.heldout.items():
        routing = model.routing(next((text for text in documents if len(text) > 600), documents[0]))
        weights_TE = routing.weights_LTE.mean(0)[:SAMPLE_TOKENS]
        rows.append(
            {
                "domain": domain,
                "experts": list(model.experts),
                "pieces": routing.pieces[:SAMPLE_TOKENS],
                "weights": [[round(float(w), 3) for w in row] for row in weights_TE],
            }
        )
    return rows


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


def classifiers(config: StudyConfig, root: pathlib.Path) -> dict[str, float]:
    """Each owner's classifier's accuracy on documents it was not trained on, where there are classifiers."""
    paths = {owner: root / "domains" / f"{owner}_classifier.json" for owner in config.owners}
    return {owner: Classifier.load(path).accuracy for owner, path in paths.items() if path.exists()}


def _totals(nats) -> np.ndarray:
    return np.array([doc.sum(dtype=np.float64) for doc in nats])
