"""Results as one HTML page that needs nothing else: it opens offline, on a phone, in light and dark.

`render` makes the page of a study, `render_quickstart` that of the quickstart; `templates/` holds what they look like.
"""

import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.foreign import read_bytes
from flexmoe_jax.json_files import MAX_TEXT_BYTES, parse_value
from flexmoe_jax.study import claims, figures
from flexmoe_jax.study.results import MARK_MEANS, RESULTS, SAMPLES, Kind, Regret, Results, SystemResult, read_results
from flexmoe_jax.tree import PUBLIC

if TYPE_CHECKING:
    from jinja2 import Template

ALONE = "public alone"  # the quickstart's row of the public model


def read_study(path: pathlib.Path) -> tuple[Results, list[dict[str, Any]]]:
    """(results, routed sample texts) of a study's folder, or of a file of results, which has no texts.

    Raises ArtifactError for a missing or broken file and for one that holds several studies.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.exists():
        raise ArtifactError(f"{file} does not exist", "give the folder of a finished `flexmoe reproduce`")
    studies = read_results(file)
    if len(studies) != 1:
        names = ", ".join(study.study for study in studies)
        raise ArtifactError(
            f"{file} holds {len(studies)} studies: {names}", "give the folder or the lines of one study"
        )
    samples = file.with_name(SAMPLES)
    if not path.is_dir() or not os.path.lexists(samples):
        return studies[0], []
    texts = parse_value(read_bytes(samples, MAX_TEXT_BYTES, ArtifactError), samples, MAX_TEXT_BYTES)
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise ArtifactError(f"{samples} is not a list of texts", "run `flexmoe reproduce` again")
    return studies[0], texts


def render(results: Results, samples: list[dict[str, Any]]) -> str:
    """The page of a study. Needs the extra `report`: ConfigError without it."""
    template = _template("study.html")
    groups, method, experts = results.grouped(), results.method, [PUBLIC, *results.owners]
    compared = {kind: [(s, results.relative_cost(s)) for s in groups.get(kind, [])] for kind in figures.COMPARED}
    colors, panels = figures.expert_colors(experts), _panels(results)
    return template.render(
        results=results,
        method=method,
        groups=groups,
        claims=claims,
        joining=joining(results),
        chosen=claims.chosen(results),
        mark=MARK_MEANS if any(system.sees_text for system in results.systems) else "",
        command=_command(results),
        failed=_failed_opt_outs(results),
        figures={
            "ranking": figures.ranking(groups, method.name),
            "costs": figures.costs(compared),
            "curves": figures.learning_curves(panels) if panels else "",
            "routing": figures.routing({d: method.share[d] for d in results.domains if d in method.share}, experts),
            "leaving": figures.matrix(
                {
                    f"without {owner}": {d: row.against_method[d].value for d in experts}
                    for owner, row in _without(results).items()
                },
                "Change in bits per byte when an owner leaves",
            ),
        },
        samples=[_colored(sample, colors) for sample in samples],
        colors=colors,
    )


def joining(results: Results) -> dict[str, list[Regret]]:
    """The rows of regret by merged model, as owners join."""
    models: dict[str, list[Regret]] = {}
    for row in results.joined:
        models.setdefault(row.model, []).append(row)
    return models


def render_quickstart(results: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """The page of the quickstart, in the order of `results`, which `results.json` holds; `samples` are routed texts.

    Needs the extra `report`: ConfigError without it.
    """
    template = _template("quickstart.html")
    bits, share = results["bits_per_byte"], results["routed_share"]
    experts = [*next(iter(share.values()))["share"]]
    colors = figures.expert_colors(experts)
    changes = {
        name: {domain: value - bits[ALONE][domain] for domain, value in row.items()}
        for name, row in bits.items()
        if name != ALONE
    }
    layers = {domain: [[*layer.values()] for layer in row["layers"]] for domain, row in share.items()}
    return template.render(
        results=results,
        experts=experts,
        figures={
            "changes": figures.matrix(changes, "Change in bits per byte against the public model"),
            "routing": figures.routing(layers, experts),
        },
        samples=[_colored(sample, colors) for sample in samples],
        colors=colors,
    )


def _template(name: str) -> "Template":
    """A template of the folder `templates`. ConfigError where the extra `report` is not installed."""
    try:
        import jinja2
        import matplotlib  # noqa: F401 - the figures need it
    except ImportError as error:
        raise ConfigError(f"the report needs {error.name}", "pip install 'flexmoe_jax[report]'") from error
    loader = jinja2.PackageLoader("flexmoe_jax.study")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def _without(results: Results) -> dict[str, SystemResult]:
    """{owner: the merged model without its expert}."""
    every = {PUBLIC, *results.owners}
    return {
        owner: next(system for system in results.systems if {*system.experts} == every - {owner})
        for owner in results.owners
    }


def _failed_opt_outs(results: Results) -> list[str]:
    return [
        f"{owner}, seed {seed}"
        for seed, owners in enumerate(results.opting_out)
        for owner, row in owners.items()
        if not row["equal"]
    ]


def _panels(results: Results) -> dict[str, dict[str, list[list[float]]]]:
    """{text: {system: points}} of all curves but those of ablations."""
    shown = {system.name for system in results.systems if system.kind != Kind.ABLATION}
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for curve in results.curves:
        if curve.system in shown:
            panels.setdefault(curve.text, {})[curve.system] = curve.points
    return panels


def _colored(sample: dict[str, Any], colors: dict[str, str]) -> dict[str, Any]:
    """A text as (piece, color, opacity, all weights in words): the color of the expert with most weight."""
    pieces = []
    for piece, weights in zip(sample["pieces"], sample["weights"], strict=True):
        best = max(range(len(weights)), key=weights.__getitem__)
        words = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(sample["experts"], weights, strict=True))
        pieces.append((piece, colors[sample["experts"][best]], round(weights[best], 2), words))
    return {"domain": sample["domain"], "pieces": pieces}


def _command(results: Results) -> str:
    """The command that made the study, where its folder has the name that experiments/reproduction.py gives."""
    size = re.fullmatch(r"reproduction-([a-z]+)", results.study)
    if size is None:
        return ""
    return f"flexmoe reproduce --config=experiments/reproduction.py:{size[1]} --config.seeds={results.config['seeds']}"
