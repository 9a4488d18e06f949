"""`flexmoe merge|optout|replace|inspect|verify|keygen|sign`: what a coordinator and an auditor do with directories."""

import pathlib

from flexmoe_jax.cli.common import add_json, emit, parser, table
from flexmoe_jax.errors import ArtifactError


def merge(argv: list[str]) -> int:
    """Joins a public release and experts; the order in which they are given does not matter."""
    example = "flexmoe merge --public release/model --expert news/package --expert math/package --out model"
    p = parser("merge", "Joins a public model and experts into one model, without training.", example)
    p.add_argument("--public", required=True, help="the public release every expert was trained beside")
    p.add_argument("--expert", action="append", required=True, help="an owner's package; may be given several times")
    p.add_argument("--out", required=True, help="new directory")
    p.add_argument("--top-k", type=int, help="experts active per token; all by default")
    p.add_argument("--link", action="store_true", help="hard-link instead of copying (same disk; see BUILD.md)")
    _add_trust(p)
    add_json(p)
    args = p.parse_args(argv)
    from flexmoe_jax.compose.merge import merge as join

    model = join(args.public, args.expert, args.out, top_k=args.top_k, link=args.link, trust=_trust(args))
    emit(_describe(model), [f"{args.out}: {', '.join(model.experts)}; top-{model.top_k}"], args.json)
    return 0


def optout(argv: list[str]) -> int:
    """Removes an expert: the rest is what a merge without it makes, byte for byte outside the journal."""
    p = parser("optout", "Removes an expert from a model, exactly.", "flexmoe optout model --expert news")
    p.add_argument("model", help="a model directory; changed in place unless --out is given")
    p.add_argument("--expert", required=True, help="the expert that leaves")
    p.add_argument("--out", help="new directory for the model without it; the given one stays as it is")
    p.add_argument("--certificate", help="new file that says what was removed and what remains, by digest")
    add_json(p)
    args = p.parse_args(argv)
    from flexmoe_jax.compose.optout import opt_out

    model = opt_out(args.model, args.expert, args.out, certificate=args.certificate)
    emit(_describe(model), [f"{model.path}: {args.expert} removed; left: {', '.join(model.experts)}"], args.json)
    return 0


def replace(argv: list[str]) -> int:
    """Puts a new package of an expert in the place of the old one."""
    p = parser("replace", "Replaces an expert by a new version.", "flexmoe replace model --expert news/package")
    p.add_argument("model", help="a model directory, changed in place")
    p.add_argument("--expert", required=True, help="the owner's new package")
    _add_trust(p)
    add_json(p)
    args = p.parse_args(argv)
    from flexmoe_jax.compose.optout import replace as put

    model = put(args.model, args.expert, trust=_trust(args))
    emit(_describe(model), [f"{args.model}: replaced from {args.expert}"], args.json)
    return 0


def inspect(argv: list[str]) -> int:
    """Shows a package's manifest, or a model's experts and journal. Arrays are not read."""
    p = parser("inspect", "Shows what a package or a model holds.", "flexmoe inspect runs/quickstart/model")
    p.add_argument("path", help="a package or a model directory")
    p.add_argument("--journal", action="store_true", help="every entry of a model's journal, in full")
    add_json(p)
    args = p.parse_args(argv)
    path = pathlib.Path(args.path)
    if args.journal:
        return _show_journal(path, args.json)
    if _is_model(path):
        from flexmoe_jax.artifacts.journal import read_journal
        from flexmoe_jax.artifacts.model_dir import open_model

        model = open_model(path)
        rows = [[n, _parameters(m), m.content[:12], m.digest[:12]] for n, m in model.manifests.items()]
        lines = [f"model {model.digest}", f"top-{model.top_k} of {len(model.experts)} experts", ""]
        lines += table(["owner", "parameters", "content", "manifest"], rows)
        entries = read_journal(path)
        lines += ["", *(f"{entry.seq}  {entry.time}  {entry.event}: {', '.join(entry.experts)}" for entry in entries)]
        emit(_describe(model), lines, args.json)
        return 0
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


def _show_journal(path: pathlib.Path, as_json: bool) -> int:
    """What happened to a model, entry by entry; a broken chain is an ArtifactError."""
    import dataclasses

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
    what = "Checks every digest of a package, a model or a run directory."
    p = parser("verify", what, "flexmoe verify runs/quickstart/model")
    p.add_argument("path", help="a package, a model or a run directory")
    p.add_argument("--quick", action="store_true", help="names, sizes and headers alone; contents are not read")
    p.add_argument("--certificate", help="also check the model against this opt-out certificate")
    _add_trust(p)
    add_json(p)
    args = p.parse_args(argv)
    trust = _trust(args)
    from flexmoe_jax.artifacts.model_dir import verify_model
    from flexmoe_jax.artifacts.package import verify_package

    path = pathlib.Path(args.path)
    if _is_model(path):
        checks = verify_model(path, quick=args.quick, trust=trust)
        if args.certificate:
            from flexmoe_jax.compose.certificate import verify_certificate

            checks += verify_certificate(args.certificate, path)
    elif args.certificate:
        raise ArtifactError(f"{path} is no model directory", "a certificate is about a model: give its directory")
    elif (path / "checkpoints").is_dir():
        from flexmoe_jax.artifacts.checkpoints import verify_run

        checks = verify_run(path, quick=args.quick)
    else:
        checks = verify_package(path, quick=args.quick, trust=trust)
    bad = [check for check in checks if not check.ok]
    lines = [f"{'ok ' if f.ok else 'BAD'}  {f.subject}  {f.detail}" for f in checks]
    rows = [{"subject": f.subject, "ok": f.ok, "detail": f.detail} for f in checks]
    emit({"path": args.path, "ok": not bad, "checks": rows}, lines, args.json)
    if bad:
        named = "; ".join(f"{f.subject}: {f.detail}" for f in bad[:3])
        raise ArtifactError(
            f"{len(bad)} of {len(checks)} checks of {path} failed: {named}", "restore it from its source"
        )
    return 0


def keygen(argv: list[str]) -> int:
    """Makes a signing key for an owner, on the owner's own machine."""
    p = parser("keygen", "Makes an Ed25519 key that signs packages.", "flexmoe keygen news.key --owner news")
    p.add_argument("key", help="new file for the private key; its line for trusted keys goes to KEY.pub")
    p.add_argument("--owner", required=True, help="whose packages it signs: an expert's name, or public")
    args = p.parse_args(argv)
    from flexmoe_jax.artifacts.signature import generate_key

    public = generate_key(args.key, args.owner)
    print(f"{args.key}: keep it secret\n{public}: give its line to whoever is to trust it")
    return 0


def sign(argv: list[str]) -> int:
    """Signs a package, or the trunk and public expert of a public release."""
    what = "Signs a package, or a public release, with its owner's key."
    p = parser("sign", what, "flexmoe sign news/package --key news.key --version 1")
    p.add_argument("package", help="a package, or a public release (a model whose only expert is public)")
    p.add_argument("--key", required=True, help="the private key that flexmoe keygen wrote")
    p.add_argument(
        "--version", type=int, required=True, help="higher than of every package signed for this owner before"
    )
    args = p.parse_args(argv)
    path = pathlib.Path(args.package)
    if _is_model(path):
        from flexmoe_jax.artifacts.model_dir import sign_release

        sign_release(path, args.key, args.version)
    else:
        from flexmoe_jax.artifacts.signature import sign_package

        sign_package(path, args.key, args.version)
    print(f"{args.package}: signed as version {args.version}")
    return 0


def _add_trust(p) -> None:
    p.add_argument("--trusted", metavar="KEYS", help="file of trusted keys: lines OWNER KEY [LOWEST VERSION]")
    p.add_argument("--require-signature", action="store_true", help="refuse what no trusted key signed")


def _trust(args):
    """The keys to hold signatures against; None if none were given."""
    if args.trusted is None:
        if args.require_signature:
            raise ArtifactError("--require-signature was given without --trusted", "say which keys to trust")
        return None
    from flexmoe_jax.artifacts.signature import read_trusted

    return read_trusted(args.trusted, args.require_signature)


def _is_model(path: pathlib.Path) -> bool:
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", "give a package or a model directory")
    return (path / "model.json").exists()


def _describe(model) -> dict:
    manifests = {n: {"manifest": m.digest, "content": m.content} for n, m in model.manifests.items()}
    return {"path": str(model.path), "digest": model.digest, "experts": list(model.experts), "top_k": model.top_k} | {
        "packages": manifests
    }


def _parameters(manifest) -> int:
    import math

    return sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
