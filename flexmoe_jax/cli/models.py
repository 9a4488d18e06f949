"""`flexmoe merge|optout|replace|inspect|verify|keygen|sign`: work on packages and models, without training."""

import argparse
import dataclasses
import math
import pathlib
import sys
from typing import TYPE_CHECKING

from flexmoe_jax.cli import joining
from flexmoe_jax.cli.common import ExistingPath, LocalPath, Parser, add_json, emit, parser, table
from flexmoe_jax.errors import ArtifactError, printable
from flexmoe_jax.ranges import COUNT, Range

if TYPE_CHECKING:
    from flexmoe_jax.artifacts.manifest import Manifest
    from flexmoe_jax.artifacts.model_dir import ModelDir
    from flexmoe_jax.artifacts.signature import Trust


def merge(argv: list[str]) -> int:
    """Merges a public release and packages; the order of the packages does not matter."""
    example = "flexmoe merge --public release/model --package news/package --package math/package --out model"
    p = parser("merge", "Merges a public model and experts into one model, without training.", example)
    what = "the public release that every expert was trained beside"
    p.add_argument("--public", required=True, action=ExistingPath, help=what)
    what = "an owner's package; may be given several times"
    p.add_argument("--package", required=True, action=ExistingPath, many=True, help=what)
    p.add_argument("--out", required=True, action=LocalPath, help="new directory for the model")
    p.add_argument("--top-k", type=COUNT, help="experts active per token; all by default")
    what = "hard-link files instead of copying them (same disk): an expert removed later stays in its package's files"
    p.add_argument("--link", action="store_true", help=what)
    _add_trust(p)
    joining.add_options(p)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.compose.merge import merge as merge_packages

    trust, texts = _trust(args), _heldout(args)
    model = merge_packages(args.public, args.package, args.out, top_k=args.top_k, link=args.link, trust=trust)
    if texts:
        print(f"{args.out} is made; scoring held-out text of {', '.join(texts)}", file=sys.stderr, flush=True)
    joined = joining.measure(model, texts, args, model.experts)
    lines = [f"{args.out}: {', '.join(model.experts)}; top-{model.top_k}", *joining.lines_of(joined, args.out)]
    emit(describe_model(model) | {"joining": joined}, lines, args.json)
    return 0


def _heldout(args: argparse.Namespace) -> dict[str, list[str]]:
    """The texts of --heldout by owner, read and checked before anything is written."""
    folders = joining.folders(args, [args.out, args.public, *args.package])
    if not folders:
        return {}
    from flexmoe_jax.artifacts.manifest import read_manifest
    from flexmoe_jax.artifacts.model_dir import open_model
    from flexmoe_jax.tree import PUBLIC

    experts = [PUBLIC, *(read_manifest(path).owner for path in args.package)]
    return joining.read(folders, args, experts, open_model(args.public).config.max_seq_len)


def optout(argv: list[str]) -> int:
    """Removes an expert: the rest is what a merge without it makes, byte for byte outside the journal."""
    p = parser("optout", "Removes an expert from a model, exactly.", "flexmoe optout model --expert news")
    p.add_argument("model", action=ExistingPath, help="a model directory; changed in place unless --out is given")
    p.add_argument("--expert", required=True, metavar="NAME", help="the expert to remove")
    p.add_argument("--out", action=LocalPath, help="new directory for the model without it; MODEL stays as it is")
    what = "new file that records by digest what was removed and what remains"
    p.add_argument("--certificate", action=LocalPath, help=what)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.compose.optout import opt_out

    model = opt_out(args.model, args.expert, args.out, certificate=args.certificate)
    lines = [f"{model.path}: {args.expert} removed; left: {', '.join(model.experts)}"]
    emit(describe_model(model), lines, args.json)
    return 0


def replace(argv: list[str]) -> int:
    """Replaces an expert by its owner's new package."""
    p = parser("replace", "Replaces an expert by a new version.", "flexmoe replace model --package news/package")
    p.add_argument("model", action=ExistingPath, help="a model directory, changed in place")
    p.add_argument("--package", required=True, action=ExistingPath, help="the owner's new package")
    _add_trust(p)
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.compose.optout import replace as replace_package

    model = replace_package(args.model, args.package, trust=_trust(args))
    emit(describe_model(model), [f"{args.model}: replaced from {args.package}"], args.json)
    return 0


def inspect(argv: list[str]) -> int:
    """Shows a package's manifest, or a model's experts and journal. Arrays are not read."""
    p = parser("inspect", "Shows what a package or a model holds.", "flexmoe inspect runs/quickstart/model")
    p.add_argument("path", action=ExistingPath, help="a package or a model directory")
    p.add_argument("--journal", action="store_true", help="every entry of a model's journal, in full")
    add_json(p)
    args = p.parse(argv)
    path = pathlib.Path(args.path)
    if args.journal:
        return _show_journal(path, args.json)
    if _is_model(path):
        return _show_model(path, args.json)
    from flexmoe_jax.artifacts.manifest import read_manifest

    manifest = read_manifest(path)
    rows = [[name, "x".join(map(str, t.shape)), t.dtype, t.sha256[:12]] for name, t in manifest.tensors.items()]
    lines = [f"package of {manifest.owner!r}, manifest {manifest.digest}", f"content {manifest.content}"]
    lines += [f"trained beside {name} {digest}" for name, digest in manifest.base.items()]
    lines += [f"{key}: {value}" for key, value in manifest.record.fields.items()]
    lines += ["", *table(["tensor", "shape", "dtype", "sha256"], rows)]
    result = {"owner": manifest.owner, "digest": manifest.digest, "content": manifest.content, "base": manifest.base}
    emit(result | {"record": manifest.record.fields, "parameters": _parameters(manifest)}, lines, args.json)
    return 0


def _show_model(path: pathlib.Path, as_json: bool) -> int:
    from flexmoe_jax.artifacts.journal import read_journal
    from flexmoe_jax.artifacts.model_dir import open_model

    model = open_model(path)
    rows = [[n, _parameters(m), m.content[:12], m.digest[:12]] for n, m in model.manifests.items()]
    lines = [f"model {model.digest}", f"top-{model.top_k} of {len(model.experts)} experts", ""]
    lines += table(["owner", "parameters", "content", "manifest"], rows)
    entries = read_journal(path)
    lines += ["", *(f"{entry.seq}  {entry.time}  {entry.event}: {', '.join(entry.experts)}" for entry in entries)]
    emit(describe_model(model), lines, as_json)
    return 0


def _show_journal(path: pathlib.Path, as_json: bool) -> int:
    """What happened to a model, entry by entry; a broken chain is an ArtifactError."""
    from flexmoe_jax.artifacts.journal import read_journal

    entries = read_journal(path)
    lines = []
    for e in entries:
        lines += [f"{e.seq}  {e.time}  {e.event}", f"   experts  {', '.join(e.experts)}", f"   model    {e.model}"]
        lines += [f"   {key:8} {value}" for key, value in e.details.items()] + [f"   line     {e.sha256}"]
    emit({"path": str(path), "entries": [dataclasses.asdict(e) for e in entries]}, lines, as_json)
    return 0


def verify(argv: list[str]) -> int:
    """Checks every file and tensor against the manifests; exit code 1 when anything is wrong."""
    what = "Checks every digest of a package, a model, a run directory or a token store."
    p = parser("verify", what, "flexmoe verify runs/quickstart/model")
    p.add_argument("path", action=ExistingPath, help="a package, a model, a run directory or a token store")
    p.add_argument("--quick", action="store_true", help="check names, sizes and headers only; contents are not read")
    what = "an opt-out certificate; the model is checked against it too"
    p.add_argument("--certificate", action=ExistingPath, help=what)
    _add_trust(p)
    add_json(p)
    args = p.parse(argv)
    trust = _trust(args)
    from flexmoe_jax.compose.verify import verify as verify_path

    checks = verify_path(args.path, quick=args.quick, trust=trust, certificate=args.certificate)
    bad = [check for check in checks if not check.ok]
    lines = [f"{'ok ' if c.ok else 'BAD'}  {c.subject}  {c.detail}" for c in checks]
    rows = [dataclasses.asdict(c) for c in checks]
    emit({"path": args.path, "ok": not bad, "checks": rows}, lines, args.json)
    if bad:
        named = printable("; ".join(f"{c.subject}: {c.detail}" for c in bad[:3]))
        what = f"{len(bad)} of {len(checks)} checks of {args.path} failed: {named}"
        raise ArtifactError(what, "; ".join(dict.fromkeys(c.remedy or "restore it from its source" for c in bad[:3])))
    return 0


def keygen(argv: list[str]) -> int:
    """Makes a signing key for an owner, on the owner's own machine."""
    p = parser("keygen", "Makes an Ed25519 key that signs packages.", "flexmoe keygen news.key --owner news")
    what = "new file for the private key; its line for files of trusted keys goes to KEY.pub"
    p.add_argument("key", action=LocalPath, help=what)
    p.add_argument("--owner", required=True, help="whose packages the key signs: an expert's name, or public")
    add_json(p)
    args = p.parse(argv)
    from flexmoe_jax.artifacts.signature import generate_key

    public = generate_key(args.key, args.owner)
    lines = [f"{args.key}: keep it secret", f"{public}: give its line to everybody who checks your signatures"]
    trusted = public.read_text(encoding="utf-8").strip()
    emit({"private": args.key, "public": str(public), "owner": args.owner, "trusted": trusted}, lines, args.json)
    return 0


def sign(argv: list[str]) -> int:
    """Signs a package, or the trunk and public expert of a public release."""
    what = "Signs a package, or a public release, with its owner's key."
    p = parser("sign", what, "flexmoe sign news/package --key news.key --version 1")
    what = "a package, or a public release (a model whose only expert is public)"
    p.add_argument("package", action=ExistingPath, help=what)
    p.add_argument("--key", required=True, action=ExistingPath, help="the private key that flexmoe keygen wrote")
    what = "1, 2, ..: higher than every version signed for this owner before"
    p.add_argument("--version", type=Range(int, 1, 2**53), required=True, help=what)
    add_json(p)
    args = p.parse(argv)
    path = pathlib.Path(args.package)
    if _is_model(path):
        from flexmoe_jax.artifacts.model_changes import sign_release

        sign_release(path, args.key, args.version)
    else:
        from flexmoe_jax.artifacts.package import sign_package

        sign_package(path, args.key, args.version)
    result = {"path": args.package, "version": args.version}
    emit(result, [f"{args.package}: signed as version {args.version}"], args.json)
    return 0


def describe_model(model: "ModelDir") -> dict:
    """A model directory as JSON values: its path, digest, experts, top-k and packages."""
    result = {"path": str(model.path), "digest": model.digest, "experts": list(model.experts), "top_k": model.top_k}
    return result | {"packages": {n: {"manifest": m.digest, "content": m.content} for n, m in model.manifests.items()}}


def _add_trust(p: Parser) -> None:
    what = "file of trusted keys; each line is OWNER KEY [LOWEST VERSION]"
    p.add_argument("--trusted", action=ExistingPath, metavar="KEYS", help=what)
    p.add_argument("--require-signature", action="store_true", help="refuse what no trusted key has signed")


def _trust(args: argparse.Namespace) -> "Trust | None":
    """The keys that signatures are checked against; None if none were given."""
    if args.trusted is None:
        if args.require_signature:
            raise ArtifactError("--require-signature was given without --trusted", "add --trusted KEYS")
        return None
    from flexmoe_jax.artifacts.signature import read_trusted

    return read_trusted(args.trusted, args.require_signature)


def _is_model(path: pathlib.Path) -> bool:
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", "give a package or a model directory")
    return (path / "model.json").exists()


def _parameters(manifest: "Manifest") -> int:
    return sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
