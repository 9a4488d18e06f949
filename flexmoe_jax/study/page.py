"""The page: what of a study's results goes where."""

import json
import pathlib
import re
from importlib import resources
from typing import Any

from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.study import figures
from flexmoe_jax.study.train import METHOD
from flexmoe_jax.tree import PUBLIC

_KEYS = {"config", "documents", "against_method", "choice", "forward_flops_per_token", "training_flops_after_public"}
_KEYS |= {"share", "opting_out", "curves", "classifiers"}


def read_study(path: pathlib.Path) -> tuple[dict, list[dict]]:
    """(results, routed sample texts or none) of a study's folder or of its results as one JSON file."""
    file = path / "results.json" if path.is_dir() else path
    samples = file.with_name("samples.json")
    if not file.exists():
        raise ArtifactError(f"{file} does not exist", "give the folder of a finished `flexmoe reproduce`")
    try:
        results = json.loads(file.read_bytes())
        results["bits_per_byte"][METHOD]["mean"]
        if missing := sorted(_KEYS - results.keys()):
            raise KeyError(", ".join(missing))
        return results, json.loads(samples.read_bytes()) if path.is_dir() and samples.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} holds no results of a study: {error!r}", "run `flexmoe reproduce` again"
        ) from error


def render(results: dict, samples: list[dict]) -> str:
    """The report on `results` as one HTML page; needs the extra `report`."""
    try:
        import jinja2
        import matplotlib  # noqa: F401 - the figures need it
    except ImportError as error:
        raise ConfigError(f"the report needs {error.name}", "pip install 'flexmoe_jax[report]'") from error
    bits, config = results["bits_per_byte"], results["config"]
    owners = sorted(config["domains"].split(","))
    experts = [PUBLIC, *owners]
    domains = [*experts, *(name for name in bits[METHOD] if name not in (*experts, "mean"))]
    against = {METHOD: {"value": 0.0, "low": 0.0, "high": 0.0}}
    against |= {system: row["mean"] for system, row in results["against_method"].items()}
    order = sorted(bits, key=lambda system: bits[system]["mean"]["value"])
    alone = {
        o: {d: bits[f"without {o}"][d]["value"] - bits[METHOD][d]["value"] for d in (PUBLIC, *owners)} for o in owners
    }
    colours = figures.colours(experts)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files("flexmoe_jax.study").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        method=METHOD,
        domains=domains,
        owners=owners,
        rows=[_row(system, results, domains) for system in order],
        results=results,
        config=config,
        command=_command(config),
        figures={
            "ranking": figures.ranking([(name, against[name]) for name in order], METHOD),
            "curves": figures.learning_curves(_groups(results["curves"], owners)),
            "routing": figures.routing({d: results["share"][METHOD][d] for d in domains}, experts),
            "leaving": figures.matrix(alone),
        },
        samples=[_coloured(sample, colours) for sample in samples],
        colours=colours,
    )


def _row(system: str, results: dict, domains: list[str]) -> dict[str, Any]:
    bits, public = results["bits_per_byte"][system], results["forward_flops_per_token"][PUBLIC]
    training = results["training_flops_after_public"]
    return {
        "system": system,
        "cells": [bits[domain] for domain in (*domains, "mean")],
        "against": results["against_method"].get(system, {}).get("mean"),
        "choice": results["choice"][system]["mean"],
        "cost": results["forward_flops_per_token"][system] / public,
        "training": 0 if system == PUBLIC else training.get(system, training[_trained(system)]),
    }


def _trained(system: str) -> str:
    """What a system that was not trained by itself is made of: the dense experts, those of a frozen trunk, or ours."""
    if "frozen trunk" in system:
        return "frozen trunk"
    dense = "BTM" in system or "soup" in system or "dense" in system or system == "prompt routing"
    return "dense" if dense else METHOD


def _groups(curves: dict[str, list], owners: list[str]) -> dict[str, dict[str, list]]:
    groups = {"public model": {"public": curves["public"]}} if "public" in curves else {}
    for owner in owners:
        groups[owner] = {"expert": curves[f"{METHOD}_{owner}"], "dense": curves[f"dense_{owner}"]}
    together = {name.replace("_", " "): points for name, points in curves.items() if name.startswith("unrestricted")}
    return groups | ({"trained together": together} if together else {})


def _coloured(sample: dict, colours: dict[str, str]) -> dict:
    """A text as (piece, colour, opacity, all weights in words): the expert with most weight, the more the stronger."""
    pieces = []
    for piece, weights in zip(sample["pieces"], sample["weights"], strict=True):
        best = max(range(len(weights)), key=weights.__getitem__)
        words = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(sample["experts"], weights, strict=True))
        pieces.append((piece, colours[sample["experts"][best]], round(weights[best], 2), words))
    return {"domain": sample["domain"], "pieces": pieces}


def _command(config: dict) -> str:
    name = re.sub(r".*reproduction-", "", config["out"].rstrip("/"))
    return (
        f"flexmoe reproduce --config=experiments/reproduction.py:{name if name.isalpha() else 'small'} "
        f"--config.seeds={config['seeds']}"
    )
