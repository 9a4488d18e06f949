"""`flexmoe train-classifier|find-proxies|tune`: router tuning on proxy documents (paper section 3.3)."""

import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import ExistingPath, LocalPath, add_fields, add_json, by_owner, emit, fields_of, parser
from flexmoe_jax.errors import DataError, did_you_mean
from flexmoe_jax.ranges import COUNT, POSITIVE, SEED

if TYPE_CHECKING:
    from flexmoe_jax.data.proxies import Classifier

_ENCODER = "sentence-transformers name or folder; all-MiniLM-L6-v2, offline, by default"


def train_classifier(argv: list[str]) -> int:
    """Trains an owner's classifier "mine or public?", on the owner's machine."""
    text = "Trains a classifier that finds public documents like an owner's; the owner gives away the classifier only."
    example = "flexmoe train-classifier data --public-data release/documents --out classifier.json"
    p = parser("train-classifier", text, example)
    what = "the owner's documents, of which the training split is read"
    p.add_argument("documents", action=ExistingPath, help=what)
    p.add_argument("--public-data", required=True, action=ExistingPath, help="public documents")
    p.add_argument("--out", required=True, action=LocalPath, help="JSON file to write, for the coordinator")
    p.add_argument("--encoder", action=LocalPath, help=_ENCODER)
    p.add_argument("--count", type=COUNT, default=1000, help="documents of each kind in the sample; 1000 by default")
    p.add_argument("--seed", type=SEED, default=0, help="of the sample; 0 by default")
    add_fields(p)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.data import proxies
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER
    from flexmoe_jax.data.sources import read_documents

    own, public = read_documents(args.documents, fields=fields_of(args)), read_documents(args.public_data)
    encoder = args.encoder or DEFAULT_ENCODER
    classifier = proxies.train_classifier(own, public, encoder=encoder, count=args.count, seed=args.seed)
    classifier.save(args.out)
    result = {"out": args.out, "documents": classifier.documents, "accuracy": classifier.accuracy}
    result |= {"held_out": classifier.held_out, "encoder": classifier.encoder}
    right = f"right on {classifier.accuracy:.1%} of {classifier.held_out} others, both kinds weighted equally"
    emit(result, [f"{args.out}: trained on {classifier.documents} documents; {right}"], args.json)
    return 0


def find_proxies(argv: list[str]) -> int:
    """Keeps the public documents that owners' classifiers find most like theirs."""
    text = (
        "Chooses proxy documents for every owner: the public ones that the owner's classifier finds most like its own."
    )
    example = "flexmoe find-proxies mix/public --classifier news=news.json --classifier math=math.json --out proxies"
    p = parser("find-proxies", text, example)
    p.add_argument("documents", action=ExistingPath, help="public documents")
    what = "an owner's classifier; may be given several times"
    p.add_argument("--classifier", action="append", required=True, metavar="OWNER=FILE", help=what)
    p.add_argument("--count", type=COUNT, default=200, help="proxies for each owner; 200 by default")
    what = "public documents to choose from, a random sample; 2000 by default"
    p.add_argument("--of", type=COUNT, default=2000, help=what)
    p.add_argument("--encoder", action=LocalPath, help="the encoder of the classifiers; all-MiniLM-L6-v2 by default")
    p.add_argument("--seed", type=SEED, default=0, help="of the sample; 0 by default")
    p.add_argument("--out", required=True, action=LocalPath, help="folder that gets one new folder per owner")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.data import proxies
    from flexmoe_jax.data.embedding import DEFAULT_ENCODER
    from flexmoe_jax.data.sources import read_documents

    encoder = args.encoder or DEFAULT_ENCODER
    options = {"count": args.count, "of": args.of, "encoder": encoder, "seed": args.seed}
    classifiers, out = _load_classifiers(args.classifier), pathlib.Path(args.out)
    odds = proxies.find_proxies(classifiers, read_documents(args.documents), out, **options)
    folders = [
        {
            "owner": owner,
            "path": str(out / owner),
            "documents": args.count,
            "log_odds": {"highest": high, "lowest": low},
        }
        for owner, (high, low) in odds.items()
    ]
    lines = [f"{out / o}: {args.count} documents, log odds {high:.2f} to {low:.2f}" for o, (high, low) in odds.items()]
    emit({"proxies": folders}, lines, args.json)
    return 0


def tune(argv: list[str]) -> int:
    """Tunes the router of a merged model on proxies."""
    text = "Tunes the router rows and biases of a merged model on proxy documents. Opting out stays exact."
    p = parser("tune", text, "flexmoe tune model --proxies proxies --public-data mix/public --out tuned")
    p.add_argument("model", action=ExistingPath, help="a merged model; it stays as it is")
    what = "the folder made by flexmoe find-proxies; it holds a folder per owner"
    p.add_argument("--proxies", required=True, action=ExistingPath, help=what)
    p.add_argument("--public-data", required=True, action=ExistingPath, help="public documents")
    what = "gets model/, packages/OWNER and runs/; resumed if it exists"
    p.add_argument("--out", required=True, action=LocalPath, help=what)
    what = "tune all rows at once, as in the paper; opting out is then approximate"
    p.add_argument("--together", action="store_true", help=what)
    p.add_argument("--steps", type=COUNT, default=100, help="optimizer steps; 100 by default")
    p.add_argument("--batch-size", type=COUNT, default=8, help="sequences per step; 8 by default")
    p.add_argument("--seq-len", type=COUNT, help="tokens per sequence; the model's maximum by default")
    p.add_argument("--lr", type=POSITIVE, default=2e-3, help="peak learning rate; 2e-3 by default")
    p.add_argument("--seed", type=SEED, default=0, help="of the order of documents; 0 by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.compose.tune import Tuning
    from flexmoe_jax.compose.tune import tune as tune_router

    folders = _proxy_folders(args.model, pathlib.Path(args.proxies))
    tuning = Tuning(args.together, args.steps, args.batch_size, args.seq_len, args.lr, args.seed)
    model = tune_router(args.model, folders, args.public_data, args.out, tuning)
    form = "together: opting out is approximate" if args.together else "each owner's by itself: opting out is exact"
    result = {"model": str(model.path), "digest": model.digest, "tuned": list(folders), "together": args.together}
    emit(result, [f"{model.path}: rows of {', '.join(folders)} tuned, {form}"], args.json)
    return 0


def _load_classifiers(items: list[str]) -> "dict[str, Classifier]":
    """`OWNER=FILE` of each item -> classifiers by owner."""
    from flexmoe_jax.data.proxies import Classifier

    files = by_owner("--classifier", items, "a file made by flexmoe train-classifier")
    return {owner: Classifier.load(path) for owner, path in files.items()}


def _proxy_folders(model: str, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """{owner: folder of its proxies} of the folders in `root`; a name that is not an expert's is a DataError."""
    from flexmoe_jax.artifacts.model_dir import open_model

    if not root.is_dir():
        raise DataError(f"{root} is not a folder", "make it with flexmoe find-proxies")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    known = open_model(model).experts
    for name in folders:
        if name not in known:
            raise DataError(f"{root / name}: there is no expert {name!r} in {model}", did_you_mean(name, known))
    return folders
