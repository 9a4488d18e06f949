"""Importing: a checkpoint becomes a model directory, or one owner's package beside an existing public model.

The trunk with the public expert, then one expert at a time are in memory. Nothing is rounded: a leaf has the dtype of
its tensors. A biasless checkpoint's experts have bias 0, a dense one's only expert the router row 0, both float32:
neither changes an output.
"""

import hashlib
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexmoe_jax import config as configs
from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.manifest import Manifest, TensorRecord
from flexmoe_jax.artifacts.model_dir import TOKENIZER, ModelDir, assemble, create_public_model
from flexmoe_jax.artifacts.package import content_digest, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import canonical_json, parse_json, sha256_array
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.data.embedding import DomainVector, projection_record, router_row
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.configuration import PROVENANCE
from flexmoe_jax.hf.mapping import Slot, check_tensors, slots
from flexmoe_jax.params import owner_spec
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, check_known, check_owner_name, flatten, unflatten

ROUTER_SCALE = 0.1  # norm of a new router row, as `RunConfig.router_scale` has it


def read_owner(source: Checkpoint, names: tuple[str, ...], owner: str) -> Params:
    """The subtree of `trunk` or of one expert as numpy arrays; `names` are the experts in the checkpoint's order."""
    model, table = source.config.model, slots(source.config.model, source.config.architecture, names)
    check_tensors(source.tensors, table, source.where)
    spec = owner_spec(model, owner)
    leaves: dict[str, np.ndarray] = {}
    for name, slot in table.items():
        if owner in slot.owners:
            _fill(leaves, slot, owner, spec[slot.path].shape, source.tensors[name].read())
    if owner != TRUNK:
        leaves = {path: np.zeros(spec[path].shape, np.float32) for path in ("router", "bias")} | leaves
    return unflatten(leaves)


def read_tree(source: Checkpoint, names: Iterable[str] | None = None) -> tuple[ModelConfig, Params]:
    """(configuration, the whole tree as numpy arrays with named experts)."""
    order = expert_names(source, names)
    experts = {name: read_owner(source, order, name) for name in order}
    return source.config.model, {"trunk": read_owner(source, order, TRUNK), "experts": experts}


def expert_names(source: Checkpoint, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """The experts of a checkpoint in its own order: `names`, else those our export recorded, else public, expert_1, ..

    Numbers have as many digits as the largest, so that the alphabetical order is that of the checkpoint.
    """
    count = source.config.experts
    order = tuple(names or source.config.provenance.get("names") or ())
    if not order:
        width = len(str(count - 1))
        order = (PUBLIC, *(f"expert_{i:0{width}}" for i in range(1, count)))
    if len(order) != count or order.count(PUBLIC) != 1 or len(set(order)) != count:
        raise ArtifactError(
            f"{source.where} has {count} experts, the names are: {', '.join(order)}",
            f"give {count} different names in the checkpoint's order, one of them {PUBLIC!r}",
        )
    for name in order:
        if name != PUBLIC:
            check_owner_name(name)
    return order


def import_model(
    source: Checkpoint,
    out: pathlib.Path | str,
    *,
    names: Iterable[str] | None = None,
    keep: Iterable[str] | None = None,
    tokenizer: str | None = None,
    domain: DomainVector | None = None,
    licence: str = "",
    contact: str = "",
) -> ModelDir:
    """Writes the checkpoint as a model at the new directory `out`.

    `keep` are the experts to take (all; `public` must be among them), `tokenizer` a `tokenizer.json`, its folder or a
    known name where the checkpoint has none, `domain` the public data's domain vector, from which a dense model's
    router row is made: owners can train experts beside it only then. Raises ArtifactError for anything in the
    checkpoint that does not fit, and DataError for a tokenizer that does not.
    """
    order = expert_names(source, names)
    kept = order if keep is None else check_known([*dict.fromkeys((PUBLIC, *keep))], order)
    if domain is not None and source.config.architecture.mixture:
        raise ArtifactError(f"{source.where} has a router of its own", "leave the domain vector out")
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.import-") as scratch:
        trunk, public = read_owner(source, order, TRUNK), read_owner(source, order, PUBLIC)
        stated: dict[str, Any] = {"licence": licence, "contact": contact}
        of_public = stated
        if domain is not None:
            router = projection_record(domain, source.config.model.d_model, ROUTER_SCALE)
            row = router_row(domain.vector, source.config.model.d_model, ROUTER_SCALE)
            public["router"] = np.tile(row, (source.config.model.num_layers, 1))
            of_public = stated | {"router": router}
        release = create_public_model(
            out if len(kept) == 1 else pathlib.Path(scratch, "release"),
            trunk,
            public,
            source.config.model,
            _tokenizer(source, tokenizer, pathlib.Path(scratch, "tokenizer")),
            _record(source, TRUNK, trunk, stated),
            _record(source, PUBLIC, public, of_public),
        )
        del trunk, public
        if len(kept) == 1:
            return release
        packages = {PUBLIC: (release.package(PUBLIC), release.manifests[PUBLIC])}
        for name in kept:
            if name != PUBLIC:
                path = pathlib.Path(scratch, "experts", name)
                expert = read_owner(source, order, name)
                record = _record(source, name, expert, stated)
                packages[name] = (path, _write_expert(path, expert, name, release, record))
        top_k = _wanted_top_k(source, len(kept))
        return assemble(out, release, packages, top_k, "imported", {"top_k": top_k}, link=True)


def import_expert(
    source: Checkpoint,
    public: ModelDir,
    out: pathlib.Path | str,
    *,
    expert: str,
    names: Iterable[str] | None = None,
    licence: str = "",
    contact: str = "",
) -> Manifest:
    """Writes one expert of the checkpoint as a package at `out`, beside the existing model `public`.

    Its trunk and public expert are compared before, tensor by tensor and bit by bit. ArtifactError for the first that
    differs.
    """
    named = tuple(names or source.config.provenance.get("names") or ())
    order = expert_names(source, named or ((PUBLIC, expert) if source.config.experts == 2 else None))
    check_known([expert], order)
    check_owner_name(expert)
    lines = sealed.differences(configs.to_mapping(source.config.model), configs.to_mapping(public.config))
    if lines:
        raise ArtifactError(
            f"{source.where} has another configuration than {public.path}: {'; '.join(lines)}",
            "give the public model this expert was trained beside",
        )
    for owner in (TRUNK, PUBLIC):
        known = public.manifests[owner].tensors
        for path, array in flatten(read_owner(source, order, owner)).items():
            found, theirs = TensorRecord(array.shape, array.dtype.name, sha256_array(array)), known[path]
            if found != theirs:
                raise ArtifactError(
                    f"{source.where}: {owner}/{path} is {found}, {public.path} has {theirs}",
                    "give the public model this expert was trained beside"
                    if path != "router"
                    else "a dense public model has no router row: import the public model from this checkpoint, with "
                    "--experts public",
                )
    if source.tokenizer is not None:
        digest = hashlib.sha256(canonical_json(parse_json(source.tokenizer[TOKENIZER], TOKENIZER))).hexdigest()
        if digest != public.tokenizer_digest:
            raise ArtifactError(
                f"{source.where} has the tokenizer {digest}, {public.path} has {public.tokenizer_digest}",
                "give the public model this expert was trained beside",
            )
    params = read_owner(source, order, expert)
    record = _record(source, expert, params, {"licence": licence, "contact": contact})
    return _write_expert(pathlib.Path(out), params, expert, public, record)


def _fill(leaves: dict, slot: Slot, owner: str, shape: tuple[int, ...], tensor: np.ndarray) -> None:
    if slot.layer is None:
        leaves[slot.path] = np.ascontiguousarray(slot.split(tensor, shape)[owner])
        return
    leaf = leaves.setdefault(slot.path, np.empty(shape, tensor.dtype))
    leaf[slot.layer] = slot.split(tensor, shape[1:])[owner]


def _write_expert(path: pathlib.Path, params: Params, name: str, release: ModelDir, record: Mapping) -> Manifest:
    base = {owner: release.manifests[owner].content for owner in (TRUNK, PUBLIC)}
    write_package(
        path,
        owner=name,
        params=params,
        config=release.config,
        base=base | {"tokenizer": release.tokenizer_digest},
        record=record,
    )
    return read_manifest(path, name)


def _record(source: Checkpoint, owner: str, params: Params, stated: dict[str, Any]) -> dict[str, Any]:
    """The record our export kept of exactly these parameters, else where they come from and what the caller states."""
    kept = source.config.provenance.get("owners", {}).get(owner, {})
    if kept.get("content") == content_digest(params) and not any(stated.values()):
        return kept["record"]
    imported: dict[str, Any] = {"architecture": source.config.architecture.name}
    if owner == TRUNK:
        fields = {key: value for key, value in source.config.fields.items() if key != PROVENANCE}
        imported |= {"config": fields, "generation_config": source.generation}
    return {**stated, "imported": imported}


def _wanted_top_k(source: Checkpoint, kept: int) -> int | None:
    """Null where our export says that every expert was active, else the configuration's, clamped."""
    wanted = source.config.provenance.get("top_k", source.config.top_k)
    return None if wanted is None else min(wanted, kept)


def _tokenizer(source: Checkpoint, given: str | None, folder: pathlib.Path) -> pathlib.Path:
    """The folder, now made, that holds the tokenizer files the model gets."""
    folder.mkdir()
    if given is not None:
        load_tokenizer(given).save(folder / TOKENIZER)
    elif source.tokenizer is None:
        raise ArtifactError(f"{source.where} has no tokenizer.json", "give one with --tokenizer")
    else:
        for name, content in source.tokenizer.items():
            if name in source.config.provenance.get("tokenizer", source.tokenizer):
                (folder / name).write_bytes(content)
    size = load_tokenizer(folder).vocab_size
    if size > source.config.model.vocab_size:
        raise ArtifactError(
            f"the tokenizer of {given or source.where} has {size} ids, the model {source.config.model.vocab_size}",
            "give the tokenizer of this model",
        )
    return folder
