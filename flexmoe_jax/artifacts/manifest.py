"""The manifest of a package, read strictly."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.arrays import ITEM_BYTES, MAX_HEADER_BYTES, METADATA_FILE, header_file, tensor_file
from flexmoe_jax.artifacts.record import Record, read_record
from flexmoe_jax.artifacts.sealed import check_fields, check_format, is_sha256, read_sealed
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.json_files import MAX_JSON_BYTES
from flexmoe_jax.mapping import from_mapping
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import Leaf, all_ranks, owner_leaves
from flexmoe_jax.tree import PUBLIC, TRUNK, check_owner_name

FORMAT = "flexmoe-package-1"
FETCH_AGAIN = "fetch the package again from its owner"


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One tensor; `sha256` (hex) is that of its little-endian C-order bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One file of the package: size in bytes and sha256 (hex)."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a package, consistent in itself.

    `content` is the digest of the tensor table: it identifies the owner's parameters, and other packages refer to it in
    `base`. `digest` is the digest of the manifest: it covers every byte of the package, and models refer to it.
    """

    owner: str
    config: ModelConfig
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    content: str
    base: dict[str, str]
    record: Record
    digest: str


def read_manifest(path: pathlib.Path | str, owner: str | None = None) -> Manifest:
    """The manifest of the package at `path`; arrays are not read.

    ArtifactError for anything altered, unknown or contradictory, and for a package of another owner than `owner`, if
    given. FlexMoEError for an owner's name, ConfigError for a configuration that is not valid.
    """
    where = pathlib.Path(path) / "manifest.json"
    fields = read_sealed(where)
    check_format(fields, FORMAT, where)
    names = ("config", "tensors", "files", "base", "record")
    texts = ("format", "owner", "config_digest", "content", "digest")
    check_fields(fields, dict.fromkeys(names, dict) | dict.fromkeys(texts, str), where)
    if owner is not None and fields["owner"] != owner:
        raise ArtifactError(
            f"{where}: this is the package of {fields['owner']!r}, not of {owner!r}", "give the right directory"
        )
    check_owner(fields["owner"])
    check_base(fields["owner"], fields["base"])
    config = from_mapping(ModelConfig, fields["config"], f"{where}: config")
    tensors = {name: _read_tensor(name, value, where) for name, value in fields["tensors"].items()}
    files = {name: _read_file(name, value, where) for name, value in fields["files"].items()}
    for name, value in (("config_digest", sealed.digest(config)), ("content", sealed.digest(fields["tensors"]))):
        if fields[name] != value:
            raise ArtifactError(f"{where}: {name} is {fields[name]}, computed from the manifest {value}", FETCH_AGAIN)
    check_shapes(fields["owner"], {name: t.shape for name, t in tensors.items()}, config)
    _check_names(files, tensors, where)
    for name, tensor in tensors.items():
        file = FileRecord(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype], tensor.sha256)
        if files[tensor_file(name, tensor.shape)] != file:
            raise ArtifactError(f"{where}: the tensor {name!r} and its files disagree", FETCH_AGAIN)
    return Manifest(
        fields["owner"],
        config,
        tensors,
        files,
        record=read_record(fields["record"], where),
        **{name: fields[name] for name in ("content", "base", "digest")},
    )


def check_owner(owner: str) -> None:
    """FlexMoEError unless `owner` is `trunk`, `public`, or a name that a data owner may use."""
    if owner not in (TRUNK, PUBLIC):
        check_owner_name(owner)


def check_base(owner: str, base: Mapping[str, str]) -> None:
    """ArtifactError unless `base` holds the digests that a package of `owner` is bound to, and only those."""
    expected = {"tokenizer"} if owner in (TRUNK, PUBLIC) else {TRUNK, PUBLIC, "tokenizer"}
    if set(base) != expected or not all(is_sha256(value) for value in base.values()):
        raise ArtifactError(
            f"the base of {owner!r} is {dict(base)}", f"give the sha256 of: {', '.join(sorted(expected))}"
        )


def check_shapes(owner: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """ArtifactError unless {path: shape} are exactly the parameters of `owner` in a model of this configuration.

    A data owner may hold each matrix of its feed-forward network as a low-rank change of the public expert's, and a
    change of the output head.
    """
    ranks = {} if owner in (TRUNK, PUBLIC) else all_ranks({path: Leaf(tuple(shape)) for path, shape in shapes.items()})
    most = min(config.d_model, config.d_ff)
    for name, rank in ranks.items():
        if rank > most:
            what = f"{owner!r}: the change of {name} has rank {rank}, and the matrix at most {most}"
            raise ArtifactError(what, "give the matrix whole")
    spec = owner_leaves(config, owner, ranks)
    for path in sorted({*spec, *shapes}):
        if path not in shapes or path not in spec:
            problem = "is missing" if path in spec else "does not belong there"
            raise ArtifactError(f"{owner!r}: the parameter {path!r} {problem}", f"give exactly: {', '.join(spec)}")
        if tuple(shapes[path]) != spec[path].shape:
            raise ArtifactError(
                f"{owner!r}: the parameter {path!r} has shape {tuple(shapes[path])}, the configuration gives "
                f"{spec[path].shape}",
                "give the parameters and the configuration of the same model",
            )


def _read_tensor(name: str, value: Any, where: object) -> TensorRecord:
    where = f"{where}: tensor {name!r}"
    check_fields(_object(value, where), {"shape": list, "dtype": str, "sha256": str}, where)
    shape_ok = all(type(size) is int and size > 0 for size in value["shape"])
    if not shape_ok or value["dtype"] not in ITEM_BYTES or not is_sha256(value["sha256"]):
        raise ArtifactError(f"{where} is {value}", FETCH_AGAIN)
    return TensorRecord(tuple(value["shape"]), value["dtype"], value["sha256"])


def _check_names(files: Mapping[str, FileRecord], tensors: Mapping[str, TensorRecord], where: object) -> None:
    """Only the files that this library writes: no path leads outside the package, and no other file is in it."""
    limits = {"card.md": MAX_JSON_BYTES, METADATA_FILE: MAX_HEADER_BYTES}
    limits |= {header_file(name): MAX_HEADER_BYTES for name in tensors}
    data = {tensor_file(name, tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*files, *limits, *data}):
        if name not in files:
            raise ArtifactError(f"{where}: the file {name!r} is missing", FETCH_AGAIN)
        if name not in limits and name not in data:
            raise ArtifactError(f"{where}: {name!r} is not a file of a package", "do not use this package")
        if name in limits and files[name].size > limits[name]:
            raise ArtifactError(
                f"{where}: the file {name!r} has {files[name].size} bytes, {limits[name]} are allowed",
                "do not use this package",
            )


def _read_file(name: str, value: Any, where: object) -> FileRecord:
    where = f"{where}: file {name!r}"
    check_fields(_object(value, where), {"size": int, "sha256": str}, where)
    if value["size"] < 0 or not is_sha256(value["sha256"]):
        raise ArtifactError(f"{where} is {value}", FETCH_AGAIN)
    return FileRecord(value["size"], value["sha256"])


def _object(value: Any, where: object) -> dict:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is {value!r}, not an object", FETCH_AGAIN)
    return value
