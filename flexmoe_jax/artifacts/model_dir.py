"""Model directories: packages, a tokenizer, `model.json` that names them by digest, and a journal.

    model/
      model.json      sealed; depends only on the packages, the tokenizer and the wanted top-k: no time, no history
      journal.jsonl   history, in hash-chained lines (journal.py)
      tokenizer.json  and its other files: tokenizer_config.json, chat_template.jinja, .. (tokenizer_files.py)
      trunk/ public/ news/ ...   packages

`top_k` in `model.json` is the wanted number of active experts, or null: every expert is active. While an expert is
replaced (compose/optout.py), its package may be in `.news-<its manifest digest>`. Readers look there first, so that
they see the model before or after the change.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.journal import FILE as JOURNAL
from flexmoe_jax.artifacts.journal import append_entry
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.package import Manifest, copy_package, load_package, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import check_fields, check_format, is_sha256, read_sealed, seal, write_json
from flexmoe_jax.artifacts.signature import FILE as SIGNATURE
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import check_outside, new_directory, sha256_file, write_bytes
from flexmoe_jax.json_files import MAX_TEXT_BYTES, canonical_json, parse_json, read_bytes
from flexmoe_jax.mapping import from_mapping, to_mapping
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import ranks_of
from flexmoe_jax.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG, limit_of, read_files, travels
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, canonical_order, check_known, expert_name, split, union

FORMAT = "flexmoe-model-2"
BOUND = "tokenizer_files"  # key of the trunk's record
T = TypeVar("T")
NOT_ALTERED = "restore the model from its source, or merge it again"


@dataclasses.dataclass(frozen=True)
class ModelDir:
    """An opened model directory. `manifests`: trunk, then experts in canonical order; `tokenizer`: {file: sha256}."""

    path: pathlib.Path
    config: ModelConfig
    manifests: dict[str, Manifest]
    tokenizer: dict[str, str]
    wanted_top_k: int | None
    digest: str

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in canonical order: `public` first, then alphabetical."""
        return tuple(name for name in self.manifests if name != TRUNK)

    @property
    def expert_digests(self) -> dict[str, str]:
        """{name: manifest digest} of the experts, as the journal records it."""
        return {name: self.manifests[name].digest for name in self.experts}

    @property
    def top_k(self) -> int:
        """Experts active per token: `wanted_top_k`, or all."""
        return self.wanted_top_k or len(self.experts)

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The path of tokenizer.json."""
        return self.path / TOKENIZER

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """{name: content} of the tokenizer's files, as `load_tokenizer` takes them; ArtifactError if one is altered."""
        return _read_bound(self.path, self.tokenizer)

    @property
    def tokenizer_digest(self) -> str:
        """sha256 (hex) of tokenizer.json."""
        return self.tokenizer[TOKENIZER]

    def package(self, name: str) -> pathlib.Path:
        """The directory that now holds the package of `trunk` or of an expert."""
        return locate_package(self.path, name, self.manifests[name].digest)


def create_model(
    path: pathlib.Path | str,
    params: Params,
    config: ModelConfig,
    tokenizer: pathlib.Path | str | bytes | Mapping[str, bytes],
    records: Mapping[str, Mapping[str, Any]],
    top_k: int | None = None,
) -> ModelDir:
    """Writes the whole tree `params` as a model at the new directory `path`; a public release has one expert, `public`.

    `tokenizer` is a tokenizer.json or the folder that holds it, with the files beside it, the bytes of a
    tokenizer.json, or {name: content} of all files. tokenizer.json is stored in canonical form. `records` holds the
    packages' records by owner: `trunk` and every expert. The trunk's record gets the digests of the files beside
    tokenizer.json under `tokenizer_files`, so that its signature covers them. ArtifactError as of `write_package`.
    """
    files, parts = _read_tokenizer(tokenizer), split(params)
    bound = _bound_by_trunk({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    kept = {key: value for key, value in records[TRUNK].items() if key != BOUND}
    records = {**records, TRUNK: {**kept, **({BOUND: bound} if bound else {})}}
    with new_directory(pathlib.Path(path)) as folder:
        for name, content in files.items():
            write_bytes(folder / name, content)
        base = {"tokenizer": sha256_file(folder / TOKENIZER)}
        for owner in (TRUNK, PUBLIC):
            _write_part(folder, owner, parts, config, base, records)
        base |= {owner: read_manifest(folder / owner, owner).content for owner in (TRUNK, PUBLIC)}
        for owner in parts.keys() - {TRUNK, PUBLIC}:
            _write_part(folder, owner, parts, config, base, records)
        write_model_json(folder, params["experts"], top_k)
        model = open_model(folder)
        append_entry(folder, "created", model.expert_digests, model.digest)
    return dataclasses.replace(model, path=pathlib.Path(path))


def _write_part(
    folder: pathlib.Path,
    owner: str,
    parts: Mapping[str, Params],
    config: ModelConfig,
    base: Mapping[str, str],
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    path, record = folder / owner, records[owner]
    write_package(path, owner=owner, params=parts[owner], config=config, base=base, record=record)


def assemble(
    out: pathlib.Path | str,
    release: ModelDir,
    packages: Mapping[str, tuple[pathlib.Path, Manifest]],
    top_k: int | None,
    event: str,
    details: Mapping[str, Any],
    link: bool = False,
) -> ModelDir:
    """Makes the new model directory `out` of the trunk, tokenizer and journal of `release` and {expert: package}.

    Everything is copied (or hard-linked) into a sibling of `out`, checked on the way, and appears by one rename. The
    journal gets the line `event` with `details`. ArtifactError for damage, and if `out` exists or is inside a source.
    """
    check_outside(pathlib.Path(out), [release.path, *(source for source, _ in packages.values())])
    with new_directory(pathlib.Path(out)) as folder:
        for name in (*release.tokenizer, JOURNAL):
            write_bytes(folder / name, read_bytes(release.path / name, MAX_TEXT_BYTES))
        sources = {TRUNK: (release.package(TRUNK), release.manifests[TRUNK]), **packages}
        for name, (source, manifest) in sources.items():
            copy_package(source, folder / name, manifest, link)
        write_model_json(folder, canonical_order(packages), top_k)
        model = open_model(folder)
        append_entry(folder, event, model.expert_digests, model.digest, **details)
    return dataclasses.replace(model, path=pathlib.Path(out))


def write_model_json(
    path: pathlib.Path, experts: Iterable[str], top_k: int | None, manifests: Mapping[str, Manifest] | None = None
) -> str:
    """Writes `path`/model.json, atomically; returns its digest. Arguments as of `seal_model`."""
    sealed = seal_model(path, experts, top_k, manifests)
    write_json(path / "model.json", sealed)
    return sealed["digest"]


def seal_model(
    path: pathlib.Path, experts: Iterable[str], top_k: int | None, manifests: Mapping[str, Manifest] | None = None
) -> dict[str, Any]:
    """The sealed content of model.json for a model of these experts with the tokenizer in `path`.

    The packages are those in `path`, or those of `manifests` if an expert is not yet in its place.
    """
    order = canonical_order(experts)
    manifests = manifests or {name: read_manifest(path / name, name) for name in (TRUNK, *order)}
    fields = {
        "format": FORMAT,
        "config": to_mapping(manifests[TRUNK].config),
        "tokenizer": {p.name: sha256_file(p) for p in sorted(path.iterdir()) if limit_of(p.name) and p.is_file()},
        "trunk": manifests[TRUNK].digest,
        "experts": [{"name": name, "manifest": manifests[name].digest} for name in order],
        "signatures": find_signatures(path, {name: manifests[name] for name in (TRUNK, *order)}),
        "top_k": top_k,
    }
    return seal(fields)


def find_signatures(path: pathlib.Path, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """{name: sha256 of signature.json} of the signed packages among `manifests` in the model directory `path`."""
    places = {name: locate_package(path, name, m.digest) / SIGNATURE for name, m in manifests.items()}
    present = {name: place for name, place in places.items() if os.path.lexists(place)}
    return {name: hashlib.sha256(read_bytes(place)).hexdigest() for name, place in present.items()}


def open_model(path: pathlib.Path | str, *, signatures: bool = True) -> ModelDir:
    """Opens a model directory: checks `model.json`, manifests, signatures' digests and tokenizer against one another.

    Arrays are not read (`load_params` and `verify_model` read them). Without `signatures` their digests may be others,
    as after a signing that was interrupted. ArtifactError names what does not agree.
    """
    path = pathlib.Path(path)
    return _steadily(path, lambda: _open(path, signatures))


def load_model(path: pathlib.Path | str, *, mapped: bool = False) -> tuple[ModelDir, Params]:
    """A model directory and its whole tree, both from before or both from after a change by another process.

    `mapped` and errors as of `load_package`.
    """
    path = pathlib.Path(path)

    def read():
        model = open_model(path)
        return model, load_params(model, mapped=mapped)

    return _steadily(path, read)


def load_params(model: ModelDir, experts: Iterable[str] | None = None, *, mapped: bool = False) -> Params:
    """The whole tree, experts named, as NumPy arrays: of all experts or only of `experts`. Every digest is checked.

    Low-rank changes are added to the public expert's matrices. `mapped` and errors as of `load_package`; FlexMoEError
    for an unknown expert.
    """
    names = model.experts if experts is None else check_known(experts, model.experts)

    def read(name: str) -> Params:
        return load_package(model.package(name), digest=model.manifests[name].digest, mapped=mapped)

    parts = {name: read(name) for name in (TRUNK, *names)}
    changed = [name for name in names if ranks_of(parts[name])]
    public = (parts[PUBLIC] if PUBLIC in parts else read(PUBLIC)) if changed else {}
    return union(parts | {name: whole_expert(name, parts[name], public, mapped=mapped) for name in changed})


def locate_package(path: pathlib.Path, name: str, digest: str) -> pathlib.Path:
    """The package with this manifest digest in the model directory `path`: staged if it is, else in its place.

    Earlier versions staged under the digest's first 12 digits, and never beside a package in its place.
    """
    staged, place, earlier = staging_place(path, name, digest), path / name, path / f".{name}-{digest[:12]}"
    return staged if staged.is_dir() else earlier if earlier.is_dir() and not os.path.lexists(place) else place


def staging_place(path: pathlib.Path, name: str, digest: str) -> pathlib.Path:
    """The hidden directory of a package while it is replaced, replaces another, or is erased.

    Its name has the whole digest: owners choose their manifests, and could make two whose first digits agree.
    """
    return path / f".{name}-{digest}"


def _steadily(path: pathlib.Path, read: Callable[[], T]) -> T:
    """The result of `read`, repeated while the model changes, and up to twice if model.json does not.

    An expert's package moves while it is replaced, and is erased after model.json no longer names it.
    """
    tries, seen = 0, None
    while True:
        now = read_sealed(path / "model.json")["digest"]
        tries, seen = (tries + 1, seen) if now == seen else (1, now)
        try:
            return read()
        except ArtifactError:
            if tries == 3:
                raise


def read_model_json(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of model.json, {name: manifest digest} of trunk and experts); ArtifactError if a field is not valid."""
    where = path / "model.json"
    fields = read_sealed(where)
    check_format(fields, FORMAT, where)
    top_k = fields["top_k"] if type(fields.get("top_k")) is int else None
    types: dict[str, type] = {**dict.fromkeys(("config", "tokenizer", "signatures"), dict), "experts": list}
    types |= {**dict.fromkeys(("format", "trunk", "digest"), str), "top_k": int if top_k is not None else type(None)}
    check_fields(fields, types, where)
    digests = {TRUNK: fields["trunk"], **_read_experts(fields["experts"], where)}
    if not all(map(is_sha256, digests.values())):  # the first digits of a digest name a directory
        raise ArtifactError(f"{where}: the manifests {sorted(digests.values())} are not digests", NOT_ALTERED)
    if top_k is not None and not 1 <= top_k < len(digests):
        raise ArtifactError(f"{where}: top_k is {top_k} with {len(digests) - 1} experts", NOT_ALTERED)
    return fields, digests


def _open(path: pathlib.Path, signatures: bool) -> ModelDir:
    fields, digests = read_model_json(path)
    config = from_mapping(ModelConfig, fields["config"], f"{path / 'model.json'}: config")
    manifests = {}
    for name, digest in digests.items():
        if locate_package(path, name, digest).is_symlink():
            raise ArtifactError(f"{path}: the package {name!r} is a symbolic link", "replace the link with the package")
        manifests[name] = read_manifest(locate_package(path, name, digest), name)
        found = manifests[name].digest
        if found != digest:
            what = f"{path}: the package {name!r} has the manifest digest {found}, model.json names {digest}"
            raise ArtifactError(what, NOT_ALTERED)
    _read_bound(path, fields["tokenizer"])
    bound, recorded = _bound_by_trunk(fields["tokenizer"]), manifests[TRUNK].record.fields.get(BOUND)
    if bound != recorded:
        what = f"{path}: model.json has the tokenizer files {bound}, the trunk's record {recorded}"
        raise ArtifactError(what, NOT_ALTERED)
    if signatures and (lines := sealed.differences(find_signatures(path, manifests), fields["signatures"])):
        raise ArtifactError(f"{path}: signatures found != those of model.json: {'; '.join(lines)}", NOT_ALTERED)
    model = ModelDir(path, config, manifests, fields["tokenizer"], fields["top_k"], fields["digest"])
    for name, manifest in manifests.items():
        check_belongs(manifest, model, path / name)
    return model


def check_belongs(manifest: Manifest, model: ModelDir, where: object) -> None:
    """ArtifactError unless a package was made for this model's trunk, public expert, tokenizer and configuration."""
    ours = {**{name: model.manifests[name].content for name in (TRUNK, PUBLIC)}, "tokenizer": model.tokenizer_digest}
    for name in ours:
        theirs = manifest.base.get(name, ours[name])  # trunk and public refer only to the tokenizer
        if theirs != ours[name]:
            part = {TRUNK: "trunk", PUBLIC: "public expert"}.get(name, name)
            raise ArtifactError(
                f"{manifest.owner!r} ({where}) was trained with the {part} {theirs}, this model's is {ours[name]}",
                f"train {manifest.owner!r} beside this public model, or use the public model it was trained beside",
            )
    lines = sealed.differences(to_mapping(manifest.config), to_mapping(model.config))
    if lines:
        raise ArtifactError(
            f"{manifest.owner!r} ({where}) has another configuration than this model: {'; '.join(lines)}",
            "use parts of one public model",
        )


def _read_experts(rows: list, where: object) -> dict[str, str]:
    for row in rows:
        if not isinstance(row, dict):
            raise ArtifactError(f"{where}: the expert {row!r} is not an object", NOT_ALTERED)
        check_fields(row, {"name": str, "manifest": str}, where)
        expert_name(row["name"])
    names = [row["name"] for row in rows]
    if not names or names[0] != PUBLIC or tuple(names) != canonical_order(names):
        raise ArtifactError(f"{where}: the experts {names} are not in canonical order, public first", NOT_ALTERED)
    return {row["name"]: row["manifest"] for row in rows}


def _read_bound(path: pathlib.Path, digests: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files in the model directory `path`, each of which must have its digest."""
    if not travels(digests):
        raise ArtifactError(f"{path}/model.json: the tokenizer files are {sorted(digests)}", NOT_ALTERED)
    files = {name: read_bytes(path / name, limit_of(name) or 0) for name in digests}
    for name, content in files.items():
        if (found := hashlib.sha256(content).hexdigest()) != digests[name]:
            raise ArtifactError(f"{path / name} has sha256 {found}, model.json says {digests[name]}", NOT_ALTERED)
    return files


def _bound_by_trunk(digests: Mapping[str, str]) -> dict[str, str] | None:
    """What the trunk's record says of the files beside tokenizer.json: nothing of a tokenizer_config.json alone."""
    beside = {name: digest for name, digest in digests.items() if name != TOKENIZER}
    return beside if beside.keys() - {TOKENIZER_CONFIG} else None


def _read_tokenizer(tokenizer: pathlib.Path | str | bytes | Mapping[str, bytes]) -> dict[str, bytes]:
    """{file name: canonical bytes}: the sha256 of tokenizer.json is then the digest that `load_tokenizer` gives."""
    if isinstance(tokenizer, bytes):
        files: Mapping[str, bytes] = {TOKENIZER: tokenizer}
    elif isinstance(tokenizer, Mapping):
        files = tokenizer
    else:
        path = pathlib.Path(tokenizer)
        path = path / TOKENIZER if path.is_dir() else path
        files = read_files(path.parent) | {TOKENIZER: read_bytes(path, MAX_TEXT_BYTES)}
    return {**files, TOKENIZER: canonical_json(parse_json(files[TOKENIZER], TOKENIZER, MAX_TEXT_BYTES))}
