"""`flexmoe eval|eval-suite|eval-harness`: scores of a model, or of any subset of its experts."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import (
    ExistingPath,
    LocalPath,
    Parser,
    add_fields,
    add_json,
    emit,
    fields_of,
    names,
    parser,
    table,
)
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.ranges import COUNT, COUNT_OR_ZERO

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flexmoe_jax.api import Model


def eval(argv: list[str]) -> int:
    """Bits per byte on held-out documents, and how much of each expert the router takes."""
    example = "flexmoe eval runs/quickstart/model --data runs/quickstart/mix/news --experts public,news"
    text = "Measures bits per byte on documents, and the share of each expert that the router chooses."
    p = _model_parser("eval", text, example)
    what = "a folder of documents; may be given several times"
    p.add_argument("--data", action=ExistingPath, many=True, required=True, help=what)
    what = "split of the documents; heldout by default"
    p.add_argument("--split", default="heldout", choices=("heldout", "train"), help=what)
    p.add_argument("--uniform", action="store_true", help="ignore the router: every expert has equal weight")
    what = "text per folder, first documents first; 200000 by default"
    p.add_argument("--max-bytes", type=COUNT, default=200_000, help=what)
    p.add_argument("--seq-len", type=COUNT, help="window in tokens; the model's maximum by default")
    p.add_argument("--stride", type=COUNT, help="tokens between windows; half the window by default")
    p.add_argument("--mesh", help="how devices share the model, as data=2,fsdp=4; all by fsdp by default")
    p.add_argument("--layers", action="store_true", help="also show the shares of every layer")
    add_fields(p)
    args = p.parse(argv)
    from flexmoe_jax.parallel.mesh import mesh_of_all
    from flexmoe_jax.parallel.processes import is_lead, join

    join()
    model = _load(args, mesh_of_all(args.mesh))
    seq_len = args.seq_len or model.config.max_seq_len
    stride = args.stride or max(seq_len // 2, 1)
    results = _score_folders(model, args, seq_len, stride)
    rows = [[d, r["bits_per_byte"], r["documents"], r["bytes"], *r["share"].values()] for d, r in results.items()]
    lines = table(["domain", "bits/byte", "docs", "bytes", *(f"share {e}" for e in model.experts)], rows)
    if args.layers:
        rows = [[f"{d} layer {i}", *share.values()] for d, r in results.items() for i, share in enumerate(r["layers"])]
        lines += ["", *table(["share", *model.experts], rows)]
    mixing = "uniform weights" if args.uniform else f"top-{model.top_k} of {len(model.experts)} experts"
    lines += ["", f"split {args.split}, windows of {seq_len} tokens with stride {stride}, {mixing}"]
    settings = {"split": args.split, "seq_len": seq_len, "stride": stride}
    settings |= {"uniform": args.uniform, "top_k": model.top_k}
    result = {"model": args.model, "experts": list(model.experts), **settings, "domains": results}
    if is_lead():
        emit(result, lines, args.json)
    return 0


def _score_folders(model: "Model", args: argparse.Namespace, seq_len: int, stride: int) -> dict[str, dict]:
    """{folder's name, or its path where two have the same name: scores}."""
    from flexmoe_jax.evaluate.perplexity import describe, heldout_texts

    results = {}
    last_parts = [pathlib.Path(folder).name for folder in args.data]
    for folder, name in zip(args.data, last_parts, strict=True):
        texts = heldout_texts(pathlib.Path(folder), args.max_bytes, args.split, fields_of(args))
        score = model.score(texts, seq_len=seq_len, stride=stride, uniform=args.uniform)
        results[name if last_parts.count(name) == 1 else folder] = describe(model.experts, score)
    return results


def eval_suite(argv: list[str]) -> int:
    """Tasks of the paper, asked as the paper asks them."""
    example = "flexmoe eval-suite model --tasks mc9,boolq --limit 200\n  flexmoe eval-suite --list"
    p = _model_parser("eval-suite", "Scores a model on tasks of the paper (section 5).", example, optional=True)
    what = "groups or tasks of the paper, comma-separated: mc9, mmlu, gen5, math2, code4, boolq, .."
    p.add_argument("--tasks", help=what)
    what = "list the paper's 31 tasks, and which of them run without a model hub"
    p.add_argument("--list", action="store_true", help=what)
    _add_task_options(p)
    what = "how a choice is asked: rc (5 examples; default), rc0 (no example), or mc (letters)"
    p.add_argument("--form", default="rc", choices=("rc", "rc0", "mc"), help=what)
    what = "bits per byte of the gold answers instead of the task's own score"
    p.add_argument("--gold", action="store_true", help=what)
    args = p.parse(argv)
    if args.list:
        return _list_suites(args.json)
    if args.model is None or args.tasks is None:
        p.error("give a model and --tasks, or --list")
    from flexmoe_jax.evaluate.suites import find_tasks, load_examples
    from flexmoe_jax.evaluate.tasks import check_allowed, run_task

    tasks = [task for suite in names(args.tasks) or [] for task in find_tasks(suite)]
    for task in tasks:  # before the first of them runs for an hour
        check_allowed(task, args.gold, args.allow_code_execution)
    model = _load(args)
    results = {}
    for task in tasks:
        examples, lm = load_examples(task, args.limit, args.form), model.lm(args.batch_size)
        options = {"gold": args.gold, "allow_code_execution": args.allow_code_execution}
        results[task.name] = run_task(lm, task, examples, **options)
    groups: dict[str, list[float]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(results[task.name].score)
    means = {group: sum(scores) / len(scores) for group, scores in groups.items()}
    rows = [[r.task, r.metric, r.score, r.error, r.examples] for r in results.values()]
    rows += [[f"mean of {group}", "", mean, "", ""] for group, mean in means.items() if len(groups[group]) > 1]
    lines = table(["task", "metric", "score", "std error", "examples"], rows)
    lines += ["", f"top-{model.top_k} of {', '.join(model.experts)}; form {args.form}, limit {args.limit or 'none'}"]
    settings = {"form": args.form, "limit": args.limit, "gold": args.gold, "top_k": model.top_k}
    found = {name: dataclasses.asdict(result) for name, result in results.items()}
    result = {"model": args.model, "experts": list(model.experts), **settings, "tasks": found, "groups": means}
    emit(result, lines, args.json)
    return 0


def eval_harness(argv: list[str]) -> int:
    """Tasks of lm-evaluation-harness, by its own code."""
    example = "flexmoe eval-harness model --tasks arc_easy,gsm8k --limit 100"
    p = _model_parser("eval-harness", "Scores a model on tasks of lm-evaluation-harness (extra `eval`).", example)
    p.add_argument("--tasks", required=True, help="comma-separated; `lm_eval ls tasks` lists them")
    _add_task_options(p)
    p.add_argument("--include", action=ExistingPath, help="a folder with task files of your own")
    p.add_argument(
        "--num-fewshot", type=COUNT_OR_ZERO, help="examples in each prompt; the task's own number by default"
    )
    what = "file that keeps answers between runs; one per model and choice of experts"
    p.add_argument("--cache", action=LocalPath, help=what)
    args = p.parse(argv)
    try:
        from flexmoe_jax.evaluate.harness import run_tasks
    except ImportError as error:
        raise ConfigError(f"eval-harness needs {error.name}", "pip install 'flexmoe_jax[eval]'") from error

    model = _load(args)
    found = run_tasks(
        model.lm(args.batch_size),
        names(args.tasks) or [],
        include=args.include,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        cache=args.cache,
        allow_code_execution=args.allow_code_execution,
    )
    rows: list[list] = []
    tasks: dict[str, dict] = {}
    for task, metrics in sorted(found["results"].items()):
        for key, value in metrics.items():
            if isinstance(value, float) and "stderr" not in key:
                metric = key.split(",")[0]
                count = found["n-samples"].get(task, {}).get("effective", 0)
                rows.append([task, metric, value, count])
                tasks.setdefault(task, {"metric": metric, "score": value, "examples": count})
    result = {"model": args.model, "experts": list(model.experts), "top_k": model.top_k, "limit": args.limit}
    result |= {"tasks": tasks, "results": found["results"]}
    emit(result, table(["task", "metric", "score", "examples"], rows), args.json)
    return 0


def _model_parser(verb: str, text: str, example: str, optional: bool = False) -> Parser:
    """A parser with the model, its experts and --json."""
    p = parser(verb, text, example)
    p.add_argument("model", nargs="?" if optional else None, action=ExistingPath, help="a model directory")
    p.add_argument("--experts", help="comma-separated names; all by default")
    add_json(p)
    return p


def _add_task_options(p: Parser) -> None:
    p.add_argument("--limit", type=COUNT, help="examples per task, a fixed random sample; all by default")
    p.add_argument("--batch-size", type=COUNT, default=8, help="sequences at a time; 8 by default")
    p.add_argument("--allow-code-execution", action="store_true", help="let programs the model writes run here")


def _load(args: argparse.Namespace, mesh: "Mesh | None" = None) -> "Model":
    """The model of the experts that are asked for."""
    from flexmoe_jax import load

    model, chosen = load(args.model, mesh), names(args.experts)
    return model if chosen is None else model.select(chosen)


def _list_suites(as_json: bool) -> int:
    from flexmoe_jax.evaluate.suites import availability

    header, rows = ["group", "here", "tasks", "the others need"], availability()
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    emit({"groups": [dict(zip(header, row, strict=True)) for row in rows]}, lines, as_json)
    return 0
