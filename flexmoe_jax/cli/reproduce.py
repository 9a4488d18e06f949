"""`flexmoe reproduce`: the paper's comparison of merging methods, its ablations, with seeds and intervals."""

import pathlib
import typing
from collections.abc import Mapping

from flexmoe_jax.cli.common import ExistingPath, LocalPath, add_json, check_paths, emit, parser, table
from flexmoe_jax.experiment import read_config

if typing.TYPE_CHECKING:
    from flexmoe_jax.study.results import Results

_TEXT = """Runs the paper's comparison. Trains the public model, the owners' experts, every ablation and every baseline
under several seeds, scores them on the same held-out text, prints the table and writes the results into config.out.
What exists already is not trained again: the same command resumes a study.

With --vary, the method and the experts it is compared with are trained at each value of one number of the
configuration, each in its own folder in config.out."""
_EXAMPLE = """flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=1
  flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=1 --config.out=runs/owner_steps \\
      --vary=owner_steps=50,100,200"""


def reproduce(argv: list[str]) -> int:
    """Runs or resumes a study and prints its table."""
    from flexmoe_jax.study.config import StudyConfig

    p = parser("reproduce", _TEXT, _EXAMPLE, config=StudyConfig)
    p.add_argument("--vary", metavar="KEY=VALUE,VALUE,..", help="train at each of these values of one key")
    add_json(p)
    args = p.parse(argv)
    config = read_config(StudyConfig, args.config, args.overrides)
    from flexmoe_jax.hf.anchors import ANCHORS

    check_paths(config, known=ANCHORS)
    from flexmoe_jax.study.reproduce import reproduce as run_study
    from flexmoe_jax.study.reproduce import vary

    if args.vary is not None:
        key, _, values = args.vary.partition("=")
        varied = vary(config, key, values.split(","))
        emit(varied, varied_lines(key, varied), args.json)
    else:
        results = run_study(config)
        emit(results, lines(results), args.json)
    return 0


def report(argv: list[str]) -> int:
    """Writes the page; it opens offline, on a phone too, in light and dark."""
    example = "flexmoe report runs/reproduction-small"
    p = parser("report", "Writes a study as one HTML page, which opens offline.", example)
    what = "the folder of a finished `flexmoe reproduce`, or its results.jsonl"
    p.add_argument("run", action=ExistingPath, help=what)
    p.add_argument("--out", action=LocalPath, help="the page; report.html in the study's folder by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.files import write_bytes
    from flexmoe_jax.study.page import read_study, render

    run = pathlib.Path(args.run)
    out = pathlib.Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "report.html"
    write_bytes(out, render(*read_study(run)).encode())
    emit({"page": str(out)}, [str(out)], args.json)
    return 0


def lines(results: "Results") -> list[str]:
    """The table for a terminal, a group for each kind of system, the best mean first.

    Bits per byte with half the width of the mean's interval, cost.
    """
    from flexmoe_jax.study.results import MARK_MEANS

    groups, rows = results.grouped(), []
    for system in (system for group in groups.values() for system in group):
        bits = [system.bits_per_byte[domain].value for domain in results.domains]
        cost = f"{results.relative_cost(system):.2f}x"
        rows.append([system.label, *bits, system.mean.value, system.mean.half_width, cost])
    header = ["held-out bits per byte", *results.domains, "mean", "+-", "cost/token"]
    head, rule, *body = table(header, rows)
    shown, rest = [head, rule], iter(body)
    for kind, group in groups.items():
        shown += ["", kind.heading, *(next(rest) for _ in group)]
    if any(system.sees_text for system in results.systems):
        shown += ["", MARK_MEANS]
    shown += ["", f"{_seeds(results)}; +- is half the 95% interval over seeds and documents"]
    if results.suites:
        from flexmoe_jax.study.suites import suite_table

        shown += [
            "",
            "The paper's tasks: accuracy, and bits per byte of the gold answers",
            *table(*suite_table(results.suites)),
        ]
    return shown


def varied_lines(key: str, results: Mapping[str, "Results"]) -> list[str]:
    """A row for each value: mean bits per byte of the method and the baselines, and how much of the routed weight of
    public text the public expert has."""
    from flexmoe_jax.study.results import Kind

    first = next(iter(results.values()))
    shown = [s.name for kind in (Kind.METHOD, Kind.BASELINE) for s in first.systems if s.kind == kind]
    rows = []
    for value, result in results.items():
        means = {system.name: system.mean.value for system in result.systems}
        layers = [layer[0] for layer in result.method.share["public"]]
        rows.append([value, *(means[name] for name in shown), f"{sum(layers) / len(layers):.1%}"])
    header = [f"mean bits per byte, {key}", *shown, "share of public"]
    return [*table(header, rows), "", _seeds(first)]


def _seeds(results: "Results") -> str:
    count = results.config["seeds"]
    return f"{count} seed{'s' if count != 1 else ''}"
