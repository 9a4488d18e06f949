"""Import: a checkpoint becomes a model directory, or one owner's package beside an existing public model.

In memory are the trunk with the public expert, then one expert at a time. Nothing is rounded: a leaf has the dtype of
its tensors, float32 where layers differ. Experts of a checkpoint without bias get bias 0, the only expert of a dense
one the router row 0, both float32: neither changes an output.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexmoe_jax.artifacts import sealed
from flexmoe_jax.artifacts.journal import append_entry
from flexmoe_jax.artifacts.manifest import Manifest, TensorRecord
from flexmoe_jax.artifacts.model_dir import ModelDir, create_model, open_model, write_model_json
from flexmoe_jax.artifacts.package import content_digest, read_manifest, write_package
from flexmoe_jax.artifacts.sealed import sha256_array
from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.embedding import DomainVector, projection_record, router_row
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, write_bytes
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.configuration import PROVENANCE
from flexmoe_jax.hf.mapping import check_tensors, slots
from flexmoe_jax.hf.tensors import widest
from flexmoe_jax.json_files import MAX_TEXT_BYTES, canonical_json, parse_json
from flexmoe_jax.mapping import to_mapping
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.params import owner_leaves
from flexmoe_jax.tokenizer_files import TOKENIZER
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, check_known, check_owner_name, flatten, unflatten, union

log = logging.getLogger(__name__)
_OTHER_PUBLIC = "give the public model that this expert was trained beside"


def read_owner(checkpoint: Checkpoint, names: tuple[str, ...], owner: str) -> Params:
    """The subtree of `trunk` or of one expert as numpy arrays; `names` are the experts in the checkpoint's order.

    Raises ArtifactError unless the tensors are exactly those that the configuration implies.
    """
    model, architecture = checkpoint.config.model, checkpoint.config.architecture
    table, spec = slots(model, architecture, names), owner_leaves(model, owner)
    check_tensors(checkpoint.tensors, table, checkpoint.where)
    tensors = {name: checkpoint.tensors[name] for name, slot in table.items() if owner in slot.owners}
    dtypes: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        dtypes.setdefault(table[name].path, set()).add(tensor.dtype)
    leaves: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        slot, shape = table[name], spec[table[name].path].shape
        if slot.layer is None:
            leaves[slot.path] = np.ascontiguousarray(slot.split(tensor.read(), shape)[owner])
        else:
            leaf = leaves.setdefault(slot.path, np.empty(shape, widest(dtypes[slot.path])))
            leaf[slot.layer] = slot.split(tensor.read(), shape[1:])[owner]
    if owner != TRUNK:
        leaves = {path: np.zeros(spec[path].shape, np.float32) for path in ("router", "bias")} | leaves
    return unflatten(leaves)


def read_tree(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> tuple[ModelConfig, Params]:
    """(configuration, whole tree as numpy arrays with named experts); for `names` see `expert_names`."""
    order = expert_names(checkpoint, names)
    experts = {name: read_owner(checkpoint, order, name) for name in order}
    return checkpoint.config.model, {"trunk": read_owner(checkpoint, order, TRUNK), "experts": experts}


def expert_names(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """The experts in the checkpoint's order: `names`, else those our export recorded, else public, expert_1, ...

    Numbers are padded to one width, so that the alphabetical order is the checkpoint's. Raises ArtifactError for names
    that are too few, too many or not distinct, and without `public`.
    """
    count = checkpoint.config.experts
    order = tuple(names or checkpoint.config.provenance.get("names") or ())
    if not order:
        width = len(str(count - 1))
        order = (PUBLIC, *(f"expert_{i:0{width}}" for i in range(1, count)))
    if len(order) != count or order.count(PUBLIC) != 1 or len(set(order)) != count:
        raise ArtifactError(
            f"{checkpoint.where} has {count} experts, the names are: {', '.join(order)}",
            f"give {count} different names in the checkpoint's order, one of them {PUBLIC!r}",
        )
    for name in order:
        if name != PUBLIC:
            check_owner_name(name)
    return order


def import_model(
    checkpoint: Checkpoint,
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

    `names`: see `expert_names`. `keep`: experts to import besides `public`; None: all. `tokenizer`: a tokenizer.json,
    its folder or a known name, for a checkpoint without one. `domain`: domain vector of the public data, from which a
    dense model gets its router row; owners can only train experts beside a public model that has one. `licence` and
    `contact` go into every package's record. Raises ArtifactError for a checkpoint that does not fit and an existing
    `out`, DataError for a tokenizer that cannot be read.
    """
    _say(checkpoint)
    order = expert_names(checkpoint, names)
    kept = order if keep is None else check_known([*dict.fromkeys((PUBLIC, *keep))], order)
    if domain is not None and checkpoint.config.architecture.mixture:
        raise ArtifactError(f"{checkpoint.where} has a router of its own", "leave the domain vector out")
    stated: dict[str, Any] = {"licence": licence, "contact": contact}
    with new_directory(pathlib.Path(out)) as folder:
        model = _write_public(folder, checkpoint, order, tokenizer, domain, stated)
        for name in kept:
            if name != PUBLIC:
                expert = read_owner(checkpoint, order, name)
                _write_expert(folder / name, expert, name, model, _record(checkpoint, name, expert, stated))
        if len(kept) > 1:
            top_k = _wanted_top_k(checkpoint, len(kept))
            write_model_json(folder, kept, top_k)
            model = open_model(folder)
            append_entry(folder, "imported", model.expert_digests, model.digest, top_k=top_k)
    return dataclasses.replace(model, path=pathlib.Path(out))


def import_expert(
    checkpoint: Checkpoint,
    public: ModelDir,
    out: pathlib.Path | str,
    *,
    expert: str,
    names: Iterable[str] | None = None,
    licence: str = "",
    contact: str = "",
) -> Manifest:
    """Writes one expert of the checkpoint as a package at the new directory `out`, beside the existing model `public`.

    Raises ArtifactError unless the checkpoint has the configuration, the tokenizer and, bit for bit, the trunk and the
    public expert of `public`; it names the first tensor that differs. `names`: see `expert_names`.
    """
    _say(checkpoint)
    named = tuple(names or checkpoint.config.provenance.get("names") or ())
    order = expert_names(checkpoint, named or ((PUBLIC, expert) if checkpoint.config.experts == 2 else None))
    check_known([expert], order)
    check_owner_name(expert)
    _check_public(checkpoint, order, public)
    params = read_owner(checkpoint, order, expert)
    record = _record(checkpoint, expert, params, {"licence": licence, "contact": contact})
    return _write_expert(pathlib.Path(out), params, expert, public, record)


def _say(checkpoint: Checkpoint) -> None:
    """Logs what was read, filled in and passed over."""
    for note in checkpoint.notes:
        log.info(note)


def _write_tokenizer(folder: pathlib.Path, checkpoint: Checkpoint, given: str | None) -> None:
    """Writes the model's tokenizer files: those of `given`, else the checkpoint's."""
    if given is not None:
        load_tokenizer(given).save(folder / TOKENIZER)
    elif checkpoint.tokenizer is None:
        raise ArtifactError(f"{checkpoint.where} has no tokenizer.json", "give one with --tokenizer")
    else:
        for name, content in checkpoint.tokenizer.items():
            if name in checkpoint.config.provenance.get("tokenizer", checkpoint.tokenizer):
                write_bytes(folder / name, content)
    read, rows = load_tokenizer(folder), checkpoint.config.model.vocab_size
    read.for_rows(rows)
    if read.vocab_size > rows:
        log.info(f"special tokens from id {rows} on have no row in the model; no text gives them")


def _write_public(
    folder: pathlib.Path,
    checkpoint: Checkpoint,
    order: tuple[str, ...],
    tokenizer: str | None,
    domain: DomainVector | None,
    stated: dict[str, Any],
) -> ModelDir:
    """Makes the empty `folder` a model directory of tokenizer, trunk and public expert."""
    config = checkpoint.config.model
    trunk, public = read_owner(checkpoint, order, TRUNK), read_owner(checkpoint, order, PUBLIC)
    of_public = stated
    if domain is not None:
        scale = RunConfig.router_scale
        public["router"] = np.tile(router_row(domain.vector, config.d_model, scale), (config.num_layers, 1))
        of_public = stated | {"router": projection_record(domain, config.d_model, scale)}
    _write_tokenizer(folder, checkpoint, tokenizer)
    records = {
        TRUNK: _record(checkpoint, TRUNK, trunk, stated),
        PUBLIC: _record(checkpoint, PUBLIC, public, of_public),
    }
    params = union({TRUNK: trunk, PUBLIC: public})
    release = create_model(folder / ".release", params, config, folder, records)
    for path in sorted(release.path.iterdir()):
        path.replace(folder / path.name)
    release.path.rmdir()
    return dataclasses.replace(release, path=folder)


def _check_public(checkpoint: Checkpoint, order: tuple[str, ...], public: ModelDir) -> None:
    """Raises ArtifactError unless everything but the checkpoint's other experts is that of the model `public`."""
    lines = sealed.differences(to_mapping(checkpoint.config.model), to_mapping(public.config))
    if lines:
        what = f"{checkpoint.where} has another configuration than {public.path}: {'; '.join(lines)}"
        raise ArtifactError(what, _OTHER_PUBLIC)
    for owner in (TRUNK, PUBLIC):
        known = public.manifests[owner].tensors
        for path, array in flatten(read_owner(checkpoint, order, owner)).items():
            found, theirs = TensorRecord(array.shape, array.dtype.name, sha256_array(array)), known[path]
            if found != theirs:
                raise ArtifactError(
                    f"{checkpoint.where}: {owner}/{path} is {found}, {public.path} has {theirs}",
                    _OTHER_PUBLIC
                    if path != "router"
                    else "a dense public model has no router row: import the public model from this checkpoint, with "
                    "--experts public",
                )
    if checkpoint.tokenizer is not None:
        content = parse_json(checkpoint.tokenizer[TOKENIZER], TOKENIZER, MAX_TEXT_BYTES)
        digest = hashlib.sha256(canonical_json(content)).hexdigest()
        if digest != public.tokenizer_digest:
            what = f"{checkpoint.where} has the tokenizer {digest}, {public.path} has {public.tokenizer_digest}"
            raise ArtifactError(what, _OTHER_PUBLIC)


def _write_expert(
    path: pathlib.Path, params: Params, name: str, release: ModelDir, record: Mapping[str, Any]
) -> Manifest:
    base = {owner: release.manifests[owner].content for owner in (TRUNK, PUBLIC)}
    base["tokenizer"] = release.tokenizer_digest
    write_package(path, owner=name, params=params, config=release.config, base=base, record=record)
    return read_manifest(path, name)


def _record(checkpoint: Checkpoint, owner: str, params: Params, stated: dict[str, Any]) -> dict[str, Any]:
    """The record that our export kept of exactly these parameters, else their origin and what the caller states."""
    kept = checkpoint.config.provenance.get("owners", {}).get(owner, {})
    if "record" in kept and kept.get("content") == content_digest(params) and not any(stated.values()):
        return kept["record"]
    imported: dict[str, Any] = {"architecture": checkpoint.config.architecture.name}
    if owner == TRUNK:
        fields = {key: value for key, value in checkpoint.config.fields.items() if key != PROVENANCE}
        imported |= {"config": fields, "generation_config": checkpoint.generation}
    # Whose data had a part in it stays known in any form: a low-rank change is exported as whole matrices.
    tuned = kept.get("record", {}).get("tuned")
    return {**stated, "imported": imported, **({"tuned": tuned} if tuned else {})}


def _wanted_top_k(checkpoint: Checkpoint, kept: int) -> int | None:
    """None (all) where our export recorded None, else the configuration's number, clamped to the experts imported."""
    wanted = checkpoint.config.provenance.get("top_k", checkpoint.config.top_k)
    return None if wanted is None else min(wanted, kept)
