"""`flexmoe reproduce`: the paper's comparison of merging methods, its ablations, with seeds and intervals."""

import argparse
import pathlib
import typing
from collections.abc import Mapping

from flexmoe_jax.cli.common import parser, table
from flexmoe_jax.cli.configs import parse_config

if typing.TYPE_CHECKING:
    from flexmoe_jax.study.results import Results

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
    p.add_argument("run", help="the folder of a finished `flexmoe reproduce`, or its results.jsonl")
    p.add_argument("--out", help="the page; RUN/report.html by default")
    args = p.parse_args(argv)
    from flexmoe_jax.files import write_bytes
    from flexmoe_jax.study.page import read_study, render

    run = pathlib.Path(args.run)
    out = pathlib.Path(args.out) if args.out else (run if run.is_dir() else run.parent) / "report.html"
    write_bytes(out, render(*read_study(run)).encode())
    print(out)
    return 0


def lines(results: "Results") -> list[str]:
    """The table for a terminal, a group for each kind of system, the best mean first.

    Bits per byte with half the width of the mean's interval, accuracy on the continuation task, cost.
    """
    groups, rows = results.grouped(), []
    for system in (system for group in groups.values() for system in group):
        bits = [system.bits_per_byte[domain].value for domain in results.domains]
        right, cost = system.choice["mean"].value, results.relative_cost(system)
        rows.append([system.name, *bits, system.mean.value, system.mean.half_width, f"{right:.1%}", f"{cost:.2f}x"])
    header = ["held-out bits per byte", *results.domains, "mean", "+-", "4-way", "cost/token"]
    head, rule, *body = table(header, rows)
    shown, rest = [head, rule], iter(body)
    for kind, group in groups.items():
        shown += ["", kind.heading, *(next(rest) for _ in group)]
    return [*shown, "", f"{_seeds(results)}; +- is half the 95% interval over seeds and documents"]


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
