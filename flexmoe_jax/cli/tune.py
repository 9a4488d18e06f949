"""`flexmoe classify|proxies|tune`: router tuning on public documents that look like the owners' (paper section 3.3)."""

import pathlib

from flexmoe_jax.cli.common import add_json, emit, parser
from flexmoe_jax.errors import DataError, did_you_mean


def classify(argv: list[str]) -> int:
    """Trains an owner's classifier "mine or public?", on the owner's machine."""
    example = "flexmoe classify data --public-data release/documents --out classifier.json"
    p = parser("classify", "Trains the classifier that finds public documents like an owner's.", example)
    p.add_argument("documents", help="the owner's documents (their training split)")
    p.add_argument("--public-data", required=True, help="public documents")
    p.add_argument("--out", required=True, help="JSON file to write: the one thing to give away")
    p.add_argument("--encoder", help="sentence-transformers name or folder; all-MiniLM-L6-v2, offline, by default")
    p.add_argument("--count", type=int, default=1000, help="documents of either kind in the sample")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER
    from flexmoe_jax.data.proxies import train_classifier
    from flexmoe_jax.data.sources import read_documents

    classifier = train_classifier(
        read_documents(args.documents), read_documents(args.public_data),
        encoder=args.encoder or DEFAULT_ENCODER, count=args.count, seed=args.seed,
    )  # fmt: skip
    classifier.save(args.out)
    print(
        f"{args.out}: trained on {classifier.documents} documents; right on {classifier.accuracy:.1%} of "
        f"{classifier.held_out} others, both kinds counted alike"
    )
    return 0


def proxies(argv: list[str]) -> int:
    """Keeps the public documents that owners' classifiers find most like theirs."""
    example = "flexmoe proxies mix/public --classifier news=news.json --classifier math=math.json --out proxies"
    p = parser("proxies", "Chooses proxy documents for every owner.", example)
    p.add_argument("documents", help="public documents")
    p.add_argument("--classifier", action="append", required=True, metavar="OWNER=FILE", help="several may be given")
    p.add_argument("--count", type=int, default=200, help="proxies of each owner")
    p.add_argument("--of", type=int, default=2000, help="public documents to choose from, sampled")
    p.add_argument("--encoder", help="the classifiers' encoder, where it is not the default")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, help="folder for one new folder per owner")
    args = p.parse_args(argv)
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER
    from flexmoe_jax.data.proxies import Classifier, find_proxies
    from flexmoe_jax.data.sources import read_documents

    classifiers = {}
    for item in args.classifier:
        owner, equals, path = item.partition("=")
        if not equals or not owner:
            raise DataError(f"--classifier {item!r} names no owner", "write OWNER=FILE")
        if owner in classifiers:
            raise DataError(f"two classifiers of {owner!r} are given, the second is {path}", "give one of each owner")
        classifiers[owner] = Classifier.load(path)
    odds = find_proxies(
        classifiers, read_documents(args.documents), pathlib.Path(args.out), count=args.count, of=args.of,
        encoder=args.encoder or DEFAULT_ENCODER, seed=args.seed,
    )  # fmt: skip
    for owner, (highest, lowest) in odds.items():
        print(f"{args.out}/{owner}: {args.count} documents, log odds {highest:.2f} to {lowest:.2f}")
    return 0


def tune(argv: list[str]) -> int:
    """Tunes the router of a merged model on proxies."""
    example = "flexmoe tune model --proxies proxies --public-data mix/public --out tuned"
    p = parser("tune", "Tunes router rows and biases after the merge; opt-out stays exact.", example)
    p.add_argument("model", help="a merged model; it stays as it is")
    p.add_argument("--proxies", required=True, help="folder with one folder of proxies per owner")
    p.add_argument("--public-data", required=True, help="public documents")
    p.add_argument("--out", required=True, help="gets model/, packages/OWNER and runs/; resumed when it exists")
    p.add_argument("--together", action="store_true", help="all rows at once, as in the paper: opt-out is approximate")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--seq-len", type=int, help="the model's longest by default")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    add_json(p)
    args = p.parse_args(argv)
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.compose.tune import tune as run

    root = pathlib.Path(args.proxies)
    if not root.is_dir():
        raise DataError(f"{root} is no folder", "make it with flexmoe proxies")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    known = open_model(args.model).experts
    for name in folders:
        if name not in known:
            raise DataError(f"{root / name}: there is no expert {name!r} in {args.model}", did_you_mean(name, known))
    model = run(
        args.model, folders, args.public_data, args.out, together=args.together, steps=args.steps,
        batch_size=args.batch_size, seq_len=args.seq_len, lr=args.lr, seed=args.seed,
    )  # fmt: skip
    form = "together: opting out is approximate" if args.together else "each owner's alone: opting out is exact"
    result = {"model": str(model.path), "digest": model.digest, "tuned": list(folders), "together": args.together}
    emit(result, [f"{model.path}: rows of {', '.join(folders)} tuned, {form}"], args.json)
    return 0
