"""`flexmoe eval`: held-out text, the paper's suites and lm-evaluation-harness, for any subset of experts."""

import pathlib

from flexmoe_jax.cli.common import add_json, emit, names, parser, table
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate.perplexity import describe, heldout_texts


def eval(argv: list[str]) -> int:
    """Held-out text, a suite of the paper's tasks, or tasks of lm-evaluation-harness."""
    example = (
        "flexmoe eval runs/quickstart/model --data runs/quickstart/mix/news --experts public,news\n"
        "  flexmoe eval model --suite mc9 --limit 200\n"
        "  flexmoe eval model --tasks arc_easy,gsm8k --limit 100"
    )
    p = parser("eval", "Scores a model, or any subset of its experts.", example)
    p.add_argument("model", nargs="?", help="a model directory")
    p.add_argument("--data", action="append", help="a folder of documents: bits per byte; may be given several times")
    p.add_argument("--suite", help="groups or tasks of the paper, comma-separated: mc9, mmlu, gen5, math2, code4, ..")
    p.add_argument("--tasks", help="tasks of lm-evaluation-harness, comma-separated (extra `eval`)")
    p.add_argument("--list-suites", action="store_true", help="which of the paper's 31 tasks run without a model hub")
    p.add_argument("--experts", help="comma-separated names; all by default")
    p.add_argument("--batch-size", type=int, default=8, help="rows at a time, for --suite and --tasks")
    p.add_argument(
        "--limit", type=int, help="examples per task, a random sample that depends on nothing; all by default"
    )
    p.add_argument("--allow-code-execution", action="store_true", help="let programs the model writes run here")
    of_data = p.add_argument_group("with --data")
    of_data.add_argument("--split", default="heldout", choices=("heldout", "train"))
    of_data.add_argument("--uniform", action="store_true", help="ignore the router: every expert has equal weight")
    of_data.add_argument("--max-bytes", type=int, default=200_000, help="text per folder, first documents first")
    of_data.add_argument("--seq-len", type=int, help="window in tokens; the model's maximum by default")
    of_data.add_argument("--stride", type=int, help="tokens between windows; half the window by default")
    of_data.add_argument("--mesh", default="", help="data=2,fsdp=4: how devices share the model; all by fsdp if empty")
    of_data.add_argument("--layers", action="store_true", help="also show the shares of every layer")
    of_suite = p.add_argument_group("with --suite")
    of_suite.add_argument("--form", default="rc", choices=("rc", "rc0", "mc"), help="5-shot, 0-shot, or letters")
    of_suite.add_argument("--gold", action="store_true", help="bits per byte of the gold answers instead")
    of_tasks = p.add_argument_group("with --tasks")
    of_tasks.add_argument("--include", help="a folder of task files of your own")
    of_tasks.add_argument("--num-fewshot", type=int)
    of_tasks.add_argument("--cache", help="keep answers in this file between runs; one per model and choice of experts")
    add_json(p)
    args = p.parse_args(argv)
    if args.list_suites:
        return _list_suites(args.json)
    if args.model is None or sum(map(bool, (args.data, args.suite, args.tasks))) != 1:
        p.error("give a model and one of --data, --suite, --tasks")
    if args.mesh and not args.data:
        p.error("--mesh is for --data: suites and tasks run on one device")
    from flexmoe_jax import load
    from flexmoe_jax.parallel.mesh import mesh_of_all
    from flexmoe_jax.parallel.processes import join

    if args.data:
        join()
    model = load(args.model, mesh_of_all(args.mesh) if args.data else None)
    chosen = names(args.experts)
    model = model if chosen is None else model.select(chosen)
    if args.suite:
        return _suite(args, model)
    return _tasks(args, model) if args.tasks else _data(args, model)


def _data(args, model) -> int:
    from flexmoe_jax.parallel.processes import is_lead

    seq_len = args.seq_len or model.config.max_seq_len
    stride = args.stride or max(seq_len // 2, 1)
    results = {}
    for folder in args.data:
        texts = heldout_texts(pathlib.Path(folder), args.max_bytes, args.split)
        score = model.score(texts, seq_len=seq_len, stride=stride, uniform=args.uniform)
        name = pathlib.Path(folder).name
        results[name if [pathlib.Path(f).name for f in args.data].count(name) == 1 else folder] = describe(
            model.experts, score
        )
    rows = [[d, r["bits_per_byte"], r["documents"], r["bytes"], *r["share"].values()] for d, r in results.items()]
    lines = table(["domain", "bits/byte", "docs", "bytes", *(f"share {e}" for e in model.experts)], rows)
    if args.layers:
        rows = [[f"{d} layer {i}", *share.values()] for d, r in results.items() for i, share in enumerate(r["layers"])]
        lines += ["", *table(["share", *model.experts], rows)]
    mixing = "uniform weights" if args.uniform else f"top-{model.top_k} of {len(model.experts)} experts"
    lines += ["", f"split {args.split}, windows of {seq_len} tokens with stride {stride}, {mixing}"]
    settings = {
        "split": args.split,
        "seq_len": seq_len,
        "stride": stride,
        "uniform": args.uniform,
        "top_k": model.top_k,
    }
    result = {"model": args.model, "experts": list(model.experts), **settings, "domains": results}
    if is_lead():
        emit(result, lines, args.json)
    return 0


def _suite(args, model) -> int:
    import dataclasses

    from flexmoe_jax.evaluate.suites import find_tasks, load_examples
    from flexmoe_jax.evaluate.tasks import check_allowed, run_task

    tasks = [task for suite in names(args.suite) or [] for task in find_tasks(suite)]
    for task in tasks:  # before the first of them runs for an hour
        check_allowed(task, args.gold, args.allow_code_execution)
    results = {}
    for task in tasks:
        examples = load_examples(task, args.limit, args.form)
        results[task.name] = run_task(
            model.lm(args.batch_size), task, examples, gold=args.gold, allow_code_execution=args.allow_code_execution
        )
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


def _tasks(args, model) -> int:
    try:
        from flexmoe_jax.evaluate.harness import run_tasks
    except ImportError as error:
        raise ConfigError(f"--tasks needs {error.name}", "pip install 'flexmoe_jax[eval]'") from error

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


def _list_suites(as_json: bool) -> int:
    from flexmoe_jax.evaluate.suites import availability

    header, rows = ["group", "here", "tasks", "the others need"], availability()
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    emit({"groups": [dict(zip(header, row, strict=True)) for row in rows]}, lines, as_json)
    return 0
