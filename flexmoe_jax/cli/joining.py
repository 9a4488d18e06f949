"""`flexmoe eval-joining`, and the part of a merge's report that says the same: what joining gives or costs owners."""

import argparse
import os
import pathlib
import shlex
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import (
    ExistingPath,
    LocalPath,
    Parser,
    add_fields,
    add_json,
    by_owner,
    emit,
    fields_of,
    json_values,
    parser,
    table,
)
from flexmoe_jax.errors import ArtifactError, ConfigError, did_you_mean
from flexmoe_jax.ranges import COUNT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexmoe_jax.artifacts.model_dir import ModelDir

_FOLDER = "a folder with held-out documents of that owner, or of public"
_DIFFERENCES = ("gain", "regret")


def eval_joining(argv: list[str]) -> int:
    """What joining a merged model gives or costs owners: each on its own machine, with its own text."""
    text = "Measures what a merged model gives an owner against public alone, and costs it against its own hybrid."
    p = parser("eval-joining", text, "flexmoe eval-joining model --heldout news=data --report joining.json")
    p.add_argument("model", action=ExistingPath, help="a merged model")
    add_options(p, required=True)
    add_json(p)
    args = p.parse(argv)
    given = folders(args, [args.model])
    from flexmoe_jax.artifacts.model_dir import open_model

    model = open_model(args.model)
    texts = read(given, args, model.experts, model.config.max_seq_len)
    result = measure(model, texts, args, [name for name in model.experts if name in texts])
    emit({"model": args.model, **result}, lines_of(result, args.model), args.json)
    return 0


def add_options(p: Parser, required: bool = False) -> None:
    """The options of held-out text, windows and report, which `eval-joining` and `merge` share."""
    what = f"{_FOLDER}; may be given several times"
    p.add_argument("--heldout", action="append", default=[], required=required, metavar="OWNER=FOLDER", help=what)
    what = "held-out text per folder, first documents first; 200000 by default"
    p.add_argument("--max-bytes", type=COUNT, default=200_000, help=what)
    p.add_argument("--seq-len", type=COUNT, help="window in tokens; the model's maximum by default")
    what = "new JSON file for what joining gives or costs: numbers, no text"
    p.add_argument("--report", action=LocalPath, metavar="FILE", help=what)
    add_fields(p)


def folders(args: argparse.Namespace, kept: "Iterable[str]") -> dict[str, str]:
    """{owner: folder} of --heldout; refuses a --report that exists, has no folder, or would be inside one of `kept`."""
    given = by_owner("--heldout", args.heldout, _FOLDER)
    if args.report is not None:
        from flexmoe_jax.files import check_outside

        report = pathlib.Path(args.report)
        if os.path.lexists(report):
            raise ArtifactError(f"{report} already exists", "give another path for the report")
        if not report.absolute().parent.is_dir():
            raise ArtifactError(f"there is no folder {report.parent} for the report", "make it, or give another path")
        check_outside(report, map(pathlib.Path, kept))
    return given


def read(
    given: dict[str, str], args: argparse.Namespace, experts: "Iterable[str]", max_seq_len: int
) -> dict[str, list[str]]:
    """{owner: held-out texts}; refuses owners not in `experts`, folders without such text, and too long windows."""
    from flexmoe_jax.evaluate.perplexity import check_window, heldout_texts

    experts = list(experts)
    for owner in given:
        if owner not in experts:
            raise ConfigError(f"--heldout: there is no expert {owner!r} in the model", did_you_mean(owner, experts))
    check_window(args.seq_len or max_seq_len, max_seq_len)
    fields = fields_of(args)
    return {o: heldout_texts(pathlib.Path(f), args.max_bytes, fields=fields) for o, f in given.items()}


def measure(model: "ModelDir", texts: dict[str, list[str]], args: argparse.Namespace, owners: "Iterable[str]") -> dict:
    """What joining `model` gives or costs `owners`, as JSON values; written to --report, too.

    Those without `texts` are not measured: they get the command that measures them.
    """
    from flexmoe_jax.files import write_json

    result: dict = {"digest": model.digest, "top_k": model.top_k, "owners": {}}
    found = {}
    if texts:  # without, a merge does not import JAX
        from flexmoe_jax import load
        from flexmoe_jax.evaluate.perplexity import half_window
        from flexmoe_jax.parallel.mesh import mesh_of_all

        found = load(model.path, mesh_of_all()).joining(texts, seq_len=args.seq_len)
        seq_len = args.seq_len or model.config.max_seq_len
        result |= {"seq_len": seq_len, "stride": half_window(seq_len), "max_bytes": args.max_bytes}
    for name in owners:
        measured = found[name].describe() if name in found else {"command": _command(model.path, name)}
        result["owners"][name] = {"measured": name in found, **measured}
    if args.report is not None:
        write_json(args.report, json_values(result))
    return result


def lines_of(result: dict, model: str) -> list[str]:
    """The result of `measure` for people; `model` is the path of the model."""
    measured = {name: row for name, row in result["owners"].items() if row["measured"]}
    missing = [name for name in result["owners"] if name not in measured]
    lines = []
    if measured:
        header = ["bits/byte", "docs", "public alone", "own hybrid", "merged", "gain", "+/-", "regret", "+/-"]
        lines += table(header, [[name, *_cells(row)] for name, row in measured.items()])
        lines += [
            "",
            "gain: public alone minus merged; regret: merged minus own hybrid; +/-: 95% interval over documents",
        ]
        lines.append("windows of {seq_len} tokens with stride {stride}, top-{top_k}".format(**result))
        unsure = [f"{key} of {n}" for n, row in measured.items() for key in _DIFFERENCES if row[key]["includes_zero"]]
        lines.append(f"not told from 0 by these documents: {', '.join(unsure) or 'none'}")
    if missing:
        lines.append(f"what joining gives or costs is not measured for {', '.join(missing)}; each, with its own text:")
        lines.append(f"  {_command(model, 'OWNER')}")
    return lines


def _cells(row: dict) -> list:
    cells = [row["documents"], row["public_alone"], row["own_hybrid"], row["merged"]]
    for key in _DIFFERENCES:
        half_width = row[key]["half_width"]
        cells += [f"{row[key]['value']:+.3f}", "unknown" if half_width is None else half_width]
    return cells


def _command(model: str | pathlib.Path, owner: str) -> str:
    return f"flexmoe eval-joining {shlex.quote(str(model))} --heldout {owner}=FOLDER"
