"""What a study shows beside its tables: learning curves, routed texts, and opt-outs against models never merged."""

import json
import pathlib
import tempfile
from collections.abc import Iterable

from flexmoe_jax.api import Model
from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.compose.optout import opt_out
from flexmoe_jax.study.plan import METHOD, Artefacts
from flexmoe_jax.study.scores import Texts
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
