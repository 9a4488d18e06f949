"""The model card of an export: owners, licenses, training records, and how an owner leaves."""

import re
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.artifacts.manifest import Manifest
from flexmoe_jax.artifacts.model_dir import ModelDir
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.hf.architectures import Architecture
from flexmoe_jax.params import count_parameters
from flexmoe_jax.tree import TRUNK

NOT_STATED = "not stated"


def model_card(
    model: ModelDir,
    names: tuple[str, ...],
    architecture: Architecture,
    provenance: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the metadata block of the Hugging Face Hub; a function of the exported packages only.

    `names` are the exported experts, `provenance` is the object under `flexmoe` in config.json, `evaluation` a result
    of `flexmoe eval --json`. Raises ConfigError without huggingface_hub.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError as error:
        raise ConfigError("the model card needs huggingface_hub", "pip install 'flexmoe_jax[hf]'") from error
    manifests = {name: model.manifests[name] for name in (TRUNK, *names)}
    licenses = sorted({_line(m.record.licence or NOT_STATED) for m in manifests.values()})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="other",
        license_name=", ".join(licenses),
        tags=["flexmoe", architecture.model_type, *(["mixture-of-experts"] if architecture.mixture else [])],
    )
    parameters = sum(_parameters(m) for m in manifests.values())
    lines = [
        "# FlexMoE model",
        "",
        f"{len(names)} expert{'s' * (len(names) > 1)} ({', '.join(names)}) over one shared trunk, "
        f"{parameters:,} parameters, exported as `{architecture.name}`"
        + (f" with {min(model.top_k, len(names))} experts active per token." if architecture.mixture else "."),
        "Each part belongs to its owner. Parts were trained separately and merged without training.",
        "",
        "## Owners",
        "",
        "| part | parameters | licence | contact | steps | tokens | privacy budget | content sha256 |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, manifest) for name, manifest in manifests.items()),
        "",
        "The content digest covers the part's tensors as stored in its owner's package; `config.json` repeats it, with",
        "the whole training record, under `flexmoe`.",
        "",
        "## Evaluation",
        "",
        *_evaluation(evaluation),
        "",
        "## Opting out",
        "",
        *_opting_out(manifests),
        *_bias(architecture, provenance),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _opting_out(manifests: Mapping[str, Manifest]) -> list[str]:
    together = [name for name, manifest in manifests.items() if set(manifest.record.tuned_with) - {name}]
    if together:
        return [
            f"Approximate: {', '.join(together)} took part in router tuning or joint training with other owners' data.",
            "Removing an expert (`flexmoe optout`) removes its parameters, not its influence on these parts; packages",
            "from before that training allow exact removal.",
        ]
    return [
        "Exact: removing an owner's expert (`flexmoe optout`, then export again) gives, byte for byte, the export of a",
        "model that never had it. No part was tuned on another owner's data after the merge.",
    ]


def _row(name: str, manifest: Manifest) -> str:
    """A row of the table of owners. What an owner's record says is shown as text: it cannot act in the page."""
    record = manifest.record.fields
    training = record.get("training") or {}
    imported = record.get("imported")
    origin = imported.get("architecture") if isinstance(imported, dict) else None
    steps = training.get("steps", f"imported from {origin}" if origin else NOT_STATED)
    budget = NOT_STATED
    if "privacy_budget" in training:
        budget = training["privacy_budget"] or "none: trained without differential privacy"
    cells = [
        f"`{name}`",
        f"{_parameters(manifest):,}",
        _text(record.get("licence") or NOT_STATED),
        _text(record.get("contact") or NOT_STATED),
        _text(steps),
        _text(training.get("tokens", NOT_STATED)),
        _text(budget),
        f"`{manifest.content[:16]}`",
    ]
    return "| " + " | ".join(cells) + " |"


def _text(value: object) -> str:
    """A value as one line of Markdown that renders as the value: no markup, no HTML."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", _line(text))


def _line(text: str) -> str:
    """`text` without line ends and control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _parameters(manifest: Manifest) -> int:
    """What the export holds: low-rank changes are added to whole matrices."""
    return count_parameters(manifest.config, manifest.owner)


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    if not evaluation:
        return ["None (`flexmoe export-hf --evaluation FILE` takes a result of `flexmoe eval --json`)."]
    if "domains" in evaluation:
        rows = [f"| {d} | {r['bits_per_byte']:.3f} | {r['documents']} |" for d, r in evaluation["domains"].items()]
        return ["| held-out text | bits per byte | documents |", "|---|---|---|", *rows]
    rows = [
        f"| {task} | {result['metric']} | {result['score']:.3f} | {result['examples']} |"
        for task, result in evaluation.get("tasks", {}).items()
    ]
    return ["| task | metric | score | examples |", "|---|---|---|---|", *rows]


def _bias(architecture: Architecture, provenance: Mapping[str, Any]) -> list[str]:
    if architecture.bias:
        return [
            "",
            "## Expert bias",
            "",
            "Load with `trust_remote_code=True`: `modeling_flexmoe.py` adds the experts' bias to the router.",
        ]
    if provenance["bias_left_out"] is None:
        return []
    rows = [f"- {key}: {value}" for key, value in provenance["bias_left_out"].items()]
    return [
        "",
        "## Expert bias",
        "",
        "The experts' bias was left out, because this class has none. Measured:",
        "",
        *rows,
    ]
