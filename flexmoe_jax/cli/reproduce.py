"""`flexmoe reproduce`: the paper's comparison of merging methods, its ablations, with seeds and intervals."""

import argparse
import pathlib

from flexmoe_jax.cli.common import parser, table
from flexmoe_jax.cli.configs import parse_config
from flexmoe_jax.errors import ArtifactError

_HELP = """usage: flexmoe reproduce --config=experiments/reproduction.py:small [--config.KEY=VALUE ...]
           [--vary=KEY=VALUE,VALUE,...]

Trains the public model, the owners' experts, every ablation and every baseline, under several seeds; scores them on
the same held-out text; prints the table and writes results.json into config.out. What is already there is not done
again: stopped, it goes on with the same command.

With --vary, the method and the experts that it is held against are trained at each value of one number of the
configuration, each in a folder of its own in config.out.

examples:
  flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=1
  flexmoe reproduce --config=experiments/reproduction.py:small --config.seeds=1 --config.out=runs/lengths \\
      --vary=owner_steps=50,100,200"""


def reproduce(argv: list[str]) -> int:
    """Runs or resumes a study and prints its table."""
    if not argv or "-h" in argv or "--help" in argv:
        print(_HELP)
        return 0 if argv else 2
    from flexmoe_jax.study.config import StudyConfig
    from flexmoe_jax.study.reproduce import reproduce as run
    from flexmoe_jax.study.reproduce import vary

    p = argparse.ArgumentParser(prog="flexmoe reproduce", add_help=False, allow_abbrev=False)
    p.add_argument("--vary")
    options, rest = p.parse_known_args(argv)
    config = parse_config(rest, "reproduce", StudyConfig)
    if options.vary is not None:
        key, _, values = options.vary.partition("=")
        print("\n".join(varied_lines(key, vary(config, key, values.split(",")))))
    else:
        print("\n".join(lines(run(config))))
    return 0


def report(argv: list[str]) -> int:
    """Writes the page; it opens offline, on a phone as well, in light and dark."""
    p = parser("report", "One self-contained page about a study.", "flexmoe report runs/reproduction-small")
    p.add_argument("run", help="the folder of a finished `flexmoe reproduce`, or its results.json")
    p.add_argument("--out", help="the page; RUN/report.html by default")
    args = p.parse_args(argv)
    from flexmoe_jax.study.page import read_study, render

    run = pathlib.Path(args.run)
    out = pathlib.Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "report.html"
    page = render(*read_study(run))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error}", "give a file in a folder that exists") from error
    print(out)
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
