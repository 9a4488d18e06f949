"""`flexmoe reproduce`: the paper's comparison of merging methods, its ablations, with seeds and intervals."""

import pathlib

from flexmoe_jax.cli.common import ExistingPath, LocalPath, add_json, check_paths, emit, parser, table
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.experiment import read_config

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
    check_paths(config)
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
    p = parser(
        "report", "Writes a study as one HTML page, which opens offline.", "flexmoe report runs/reproduction-small"
    )
    what = "the folder of a finished `flexmoe reproduce`, or its results"
    p.add_argument("run", action=ExistingPath, help=what)
    p.add_argument("--out", action=LocalPath, help="the page; report.html in the study's folder by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.study.page import read_study, render

    run = pathlib.Path(args.run)
    out = pathlib.Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "report.html"
    page = render(*read_study(run))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}", "give a file in a folder that exists") from error
    emit({"page": str(out)}, [str(out)], args.json)
    return 0


def lines(results: dict) -> list[str]:
    """The table for a terminal: bits per byte, half the width of the mean's interval, choices, costs."""
    bits, flops = results["bits_per_byte"], results["forward_flops_per_token"]
    domains = [name for name in next(iter(bits.values())) if name != "mean"]
    rows = []
    for system, row in sorted(bits.items(), key=lambda item: item[1]["mean"]["value"]):
        mean = row["mean"]
        cells = [row[domain]["value"] for domain in domains]
        half = (mean["high"] - mean["low"]) / 2
        cost = flops[system] / flops["public"]
        right = results["choice"][system]["mean"]["value"]
        rows.append([system, *cells, mean["value"], half, f"{right:.1%}", f"{cost:.2f}x"])
    header = ["held-out bits per byte", *domains, "mean", "+-", "4-way", "cost/token"]
    seeds = results["config"]["seeds"]
    return [*table(header, rows), "", f"{seeds} seeds; +- is half the 95% interval over seeds and documents"]


def varied_lines(key: str, results: dict[str, dict]) -> list[str]:
    """A row for each value: mean bits per byte of what matters, and the public expert's share of public text."""
    from flexmoe_jax.study.train import METHOD

    shown, rows = ("public", METHOD, "uniform mixing", "oracle expert, frozen trunk", "oracle dense expert"), []
    for value, result in results.items():
        means = [result["bits_per_byte"][system]["mean"]["value"] for system in shown]
        layers = [layer[0] for layer in result["share"][METHOD]["public"]]
        rows.append([value, *means, f"{sum(layers) / len(layers):.1%}"])
    seeds = next(iter(results.values()))["config"]["seeds"]
    return [*table([f"mean bits per byte, {key}", *shown, "share of public"], rows), "", f"{seeds} seeds"]
