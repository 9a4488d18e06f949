"""`flexmoe compress` and `flexmoe rebase`: an owner's package in a smaller form, and beside a newer public model."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import ExistingPath, LocalPath, Parser, add_fields, add_json, emit, fields_of, parser, table
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.ranges import COUNT

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexmoe_jax.tree import Params


def compress(argv: list[str]) -> int:
    """Writes a smaller package, and says what that costs on the owner's held-out text."""
    text = (
        "Writes an owner's package with low-rank changes of the public matrices, or in another dtype: a new package, "
        "which the owner signs again. The quality that it costs is measured on held-out text, and recorded."
    )
    p = _parser("compress", text, "flexmoe compress news --public model --rank 32 --heldout data --out news-32")
    p.add_argument("--public", action=ExistingPath, required=True, help="the public model it was trained beside")
    p.add_argument("--rank", help="of all three matrices, as 32, or of each: w_gate=16,w_up=16,w_down=64")
    p.add_argument("--dtype", help="of stored matrices: float32, bfloat16, float16")
    p.add_argument("--heldout", action=ExistingPath, metavar="FOLDER", help="held-out documents of the owner")
    what = "held-out text that is scored, first documents first; 200000 by default"
    p.add_argument("--max-bytes", type=COUNT, default=200_000, help=what)
    add_fields(p)
    args = p.parse(argv)
    if args.rank is None and args.dtype is None:
        raise ConfigError("neither --rank nor --dtype is given", "give one of the two, or both")
    from flexmoe_jax.compose.convert import compress as convert

    score = None
    if args.heldout is not None:
        from flexmoe_jax.evaluate.perplexity import heldout_texts

        texts = heldout_texts(pathlib.Path(args.heldout), args.max_bytes, fields=fields_of(args))
        score = _beside_public(args.public, texts)
    result = convert(args.package, args.public, args.out, args.rank, args.dtype, score)
    rows = [[name, result.ranks.get(name, "whole"), f"{share:.1%}"] for name, share in result.kept.items()]
    lines = table(["matrix", "rank", "of the change"], rows) if rows else []
    lines.append(f"{args.out}: {result.bytes_after:,} bytes of {result.bytes_before:,}")
    if result.bits_per_byte_after is None:
        lines.append("what that costs is not measured: give --heldout FOLDER")
    else:
        before, after = result.bits_per_byte_before, result.bits_per_byte_after
        lines.append(f"held-out bits per byte beside the public expert: {before:.4f} before, {after:.4f} after")
    emit({"package": args.out, **dataclasses.asdict(result)}, lines, args.json)
    return 0


def rebase(argv: list[str]) -> int:
    """Writes a package for a public model that was trained further since."""
    text = (
        "Carries an expert over to a public model that was trained further: what the owner changed is added to the new "
        "public expert. Nothing is trained; `flexmoe train --config.expert` goes on from the result, if need be."
    )
    p = _parser("rebase", text, "flexmoe rebase news --old model-1 --new model-2 --out news-2")
    p.add_argument("--old", action=ExistingPath, required=True, help="the public model it was trained beside")
    p.add_argument("--new", action=ExistingPath, required=True, help="the public model it shall run beside")
    args = p.parse(argv)
    from flexmoe_jax.compose.convert import rebase as convert

    moved = convert(args.package, args.old, args.new, args.out)
    lines = table(["matrix", "the public expert moved by"], [[name, f"{share:.2%}"] for name, share in moved.items()])
    emit(
        {"package": args.out, "moved": moved}, [*lines, f"{args.out}: sign it again, and say that it moved"], args.json
    )
    return 0


def _parser(verb: str, text: str, example: str) -> Parser:
    p = parser(verb, text, example)
    p.add_argument("package", action=ExistingPath, help="an owner's package")
    p.add_argument("--out", action=LocalPath, required=True, help="the new package")
    add_json(p)
    return p


def _beside_public(public: str, texts: list[str]) -> "Callable[[Params], float]":
    """Bits per byte of `texts` of an expert beside the public one."""
    import flexmoe_jax
    from flexmoe_jax.tree import PUBLIC

    model = flexmoe_jax.load(public).select((PUBLIC,))

    def score(expert: "Params") -> float:
        experts = {PUBLIC: model.params["experts"][PUBLIC], "owner": expert}
        hybrid = dataclasses.replace(model, params={**model.params, "experts": experts}, wanted_top_k=None)
        return hybrid.score(texts).bits_per_byte

    return score
