"""`flexmoe attack-extract` and `flexmoe attack-membership`: what a model gives away of its training text."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import ExistingPath, Parser, add_fields, add_json, emit, fields_of, names, parser, table
from flexmoe_jax.errors import DataError
from flexmoe_jax.ranges import COUNT, COUNT_OR_ZERO

if TYPE_CHECKING:
    from flexmoe_jax.api import Model

_SPLITS = ("train", "heldout")


def attack_extract(argv: list[str]) -> int:
    """How much of documents a model gives back, for any choice of experts."""
    text = (
        "Asks a model to go on from random places of documents, as the paper does (section 5.3), and computes how "
        "likely it draws their next 50 tokens as they are. Documents that it never saw show what is no memory."
    )
    p = _parser(
        "attack-extract", text, "flexmoe attack-extract model --data math --experts public --experts public,math"
    )
    p.add_argument("--data", action=ExistingPath, required=True, help="a folder of documents that were trained on")
    what = "a folder of documents of the same source that were not: the control"
    p.add_argument("--control", action=ExistingPath, help=what)
    p.add_argument("--control-split", default="heldout", choices=_SPLITS, help="its split; heldout by default")
    what = "continuations of each document, 10 by default as in the paper; 0 computes probabilities alone"
    p.add_argument("--samples", type=COUNT_OR_ZERO, default=10, help=what)
    args = p.parse(argv)
    from flexmoe_jax.attack.extraction import extract, passages

    sources = {"data": _texts(args, args.data, args.split)}
    if args.control is not None:
        sources["control"] = _texts(args, args.control, args.control_split)
    results: dict[str, dict] = {}
    rows: list[list] = []
    for chosen, model in _models(args)[1].items():
        for source, texts in sources.items():
            pieces = passages(texts, model.tokenizer, model.config.max_seq_len, args.documents, args.seed)
            found = extract(model, pieces, args.samples, args.seed).shares()
            results.setdefault(chosen, {})[source] = {name: share.describe() for name, share in found.items()}
            for name, share in found.items():
                low, high = share.interval
                rows.append([f"{chosen}: {source}", name, f"{share.count} of {share.documents}", f"{share.value:.2%}"])
                rows[-1].append(f"{low:.2%} to {high:.2%}")
    lines = table(["experts", "given back", "documents", "share", "95% interval"], rows)
    lines += ["", "paper: a sample is 90% similar, prompt included; continuation: without the prompt;"]
    lines.append("N draws: the next 50 tokens come back, as they are, with a probability of a half")
    settings = {"documents": args.documents, "samples": args.samples, "seed": args.seed, "split": args.split}
    emit({"model": args.model, **settings, "experts": results}, lines, args.json)
    return 0


def attack_membership(argv: list[str]) -> int:
    """Whether trained documents can be told from others, for any choice of experts."""
    text = (
        "Scores documents that were trained on and documents that were not, and says how well that tells them apart: "
        "the AUC is 0.5 by chance. Both must be random parts of one collection; words alone, without the model, show "
        "whether they are."
    )
    example = (
        "flexmoe attack-membership model --members math --others math --others-split heldout --experts public,math"
    )
    p = _parser("attack-membership", text, example)
    p.add_argument("--members", action=ExistingPath, required=True, help="a folder of documents that were trained on")
    what = "a folder of documents of the same source that were not"
    p.add_argument("--others", action=ExistingPath, required=True, help=what)
    p.add_argument("--others-split", default="heldout", choices=_SPLITS, help="their split; heldout by default")
    args = p.parse(argv)
    from flexmoe_jax.attack.membership import blind_separation, member_scores, separation, shared
    from flexmoe_jax.tree import PUBLIC

    members, others = (
        _texts(args, folder, split)[: args.documents]
        for folder, split in ((args.members, args.split), (args.others, args.others_split))
    )
    if both := len({*members} & {*others}):
        what = f"{both} of the {len(others)} other documents are members, too"
        raise DataError(what, "give documents that were not trained on")
    blind, common = blind_separation(members, others, args.seed), shared(members, others)
    found = {"none": {"words alone": blind}}
    whole, models = _models(args)
    before = [member_scores(whole.select((PUBLIC,)), texts) for texts in (members, others)]
    for chosen, model in models.items():
        if model.experts == (PUBLIC,):
            scores = before
        else:
            scores = [member_scores(model, *pair) for pair in zip((members, others), before, strict=True)]
        found[chosen] = {name: separation(scores[0][name], scores[1][name]) for name in scores[0]}
    rows = [
        [chosen, name, one.auc, f"{one.low:.3f} to {one.high:.3f}"]
        + [f"{one.found[rate][0]:.1%}" if rate in one.found else "-" for rate in (0.01, 0.001)]
        for chosen, attacks in found.items()
        for name, one in attacks.items()
    ]
    lines = table(["experts", "attack", "AUC", "95% interval", "found at 1%", "at 0.1%"], rows)
    lines += ["", f"{len(members)} members, {len(others)} others"]
    if common:
        lines.append(f"{common} of the others share 13 words in a row with a member")
    if not blind.is_chance:
        lines.append("words alone tell members from others: these are no random parts, and the rest is no evidence")
    settings = {"members": len(members), "others": len(others), "shared": common, "evidence": blind.is_chance}
    emit({"model": args.model, **settings, "seed": args.seed, "experts": found}, lines, args.json)
    return 0


def _parser(verb: str, text: str, example: str) -> Parser:
    p = parser(verb, text, example)
    p.add_argument("model", action=ExistingPath, help="a model directory")
    what = "comma-separated names; may be given several times; all experts by default"
    p.add_argument("--experts", action="append", help=what)
    p.add_argument("--split", default="train", choices=_SPLITS, help="split of what was trained on; train by default")
    p.add_argument("--documents", type=COUNT, default=500, help="documents of each folder; 500 by default")
    p.add_argument("--seed", type=COUNT_OR_ZERO, default=0, help="seed of the choice of documents, and of samples")
    add_fields(p)
    add_json(p)
    return p


def _texts(args: argparse.Namespace, folder: str, split: str) -> list[str]:
    """The texts of a split of a folder, in a random order; DataError without any."""
    import numpy as np

    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.evaluate.perplexity import first_texts

    documents = read_documents(pathlib.Path(folder), split, fields_of(args))
    texts = first_texts(documents, 2**40)
    return [texts[n] for n in np.random.default_rng(args.seed).permutation(len(texts))]


def _models(args: argparse.Namespace) -> "tuple[Model, dict[str, Model]]":
    """(the whole model, {experts: the model of them} for every --experts); all are checked before one is used."""
    from flexmoe_jax import load

    model = load(args.model)
    chosen = [names(text) or [] for text in args.experts or [",".join(model.experts)]]
    return model, {",".join(experts): model.select(experts) for experts in chosen}
