"""`flexmoe eval`: held-out bits per byte and routed shares, per domain, for any subset of experts."""

import pathlib

from flexmoe_jax.cli.common import add_json, emit, names, parser, table
from flexmoe_jax.errors import DataError


def eval(argv: list[str]) -> int:
    """Prints one row per data folder."""
    example = "flexmoe eval runs/quickstart/model --data runs/quickstart/mix/news --experts public,news"
    p = parser("eval", "Held-out bits per byte, and each expert's share of the routing.", example)
    p.add_argument("model", help="a model directory")
    p.add_argument("--data", action="append", required=True, help="a folder of documents; may be given several times")
    p.add_argument("--split", default="heldout", choices=("heldout", "train"))
    p.add_argument("--experts", help="comma-separated names; all by default")
    p.add_argument("--uniform", action="store_true", help="ignore the router: every expert has equal weight")
    p.add_argument("--max-bytes", type=int, default=200_000, help="text per folder, first documents first")
    p.add_argument("--seq-len", type=int, help="window in tokens; the model's maximum by default")
    p.add_argument("--stride", type=int, help="tokens between windows; half the window by default")
    p.add_argument("--layers", action="store_true", help="also show the shares of every layer")
    add_json(p)
    args = p.parse_args(argv)
    from flexmoe_jax import load

    model = load(args.model)
    chosen = names(args.experts)
    if chosen is not None:
        model = model.select(chosen)
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
    emit(result, lines, args.json)
    return 0


def heldout_texts(folder: pathlib.Path, max_bytes: int, split: str = "heldout") -> list[str]:
    """The first documents of a folder's split, at most `max_bytes` of text but at least one document."""
    from flexmoe_jax.data.sources import read_documents

    texts: list[str] = []
    size = 0
    for document in read_documents(folder, split):
        size += len(document.text.encode())
        if texts and size > max_bytes:
            break
        texts.append(document.text)
    if not texts:
        raise DataError(f"{folder} has no document of the split {split!r}", "give a folder with held-out documents")
    return texts


def describe(experts: tuple[str, ...], score) -> dict:
    """A Score as JSON values."""
    layers = [dict(zip(experts, map(float, row), strict=True)) for row in score.share_LE]
    return {
        "bits_per_byte": score.bits_per_byte,
        "documents": len(score.nats_D),
        "bytes": int(score.bytes_D.sum()),
        "tokens": score.tokens,
        "share": dict(zip(experts, map(float, score.share_LE.mean(0)), strict=True)),
        "layers": layers,
    }
