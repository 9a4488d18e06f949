"""Export: from a model directory to a checkpoint that `transformers` loads, tensor by tensor.

Packages' files are mapped into memory, not read: memory use is that of the largest tensor, at any size of the model.
What was written is read back as an import reads it: every part must then have the sha256 of its manifest, so that
damage of a package, of the disk or of the way between them never becomes an export. Matrices that a low-rank change is
added to have none: their factors are compared with the manifest first, and what is read back with the sum.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexmoe_jax.artifacts.arrays import NUMPY_DTYPES, map_array
from flexmoe_jax.artifacts.low_rank import whole_expert
from flexmoe_jax.artifacts.model_dir import ModelDir
from flexmoe_jax.artifacts.package import check_files, load_package, raise_problems
from flexmoe_jax.artifacts.sealed import sha256_array
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, write_bytes, write_json
from flexmoe_jax.hf import card
from flexmoe_jax.hf.architectures import Architecture, architecture_of, check_no_head_changes, has_bias
from flexmoe_jax.hf.check import compare_logits
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.configuration import write_config
from flexmoe_jax.hf.mapping import Slot, slots
from flexmoe_jax.hf.tensors import Tensor, widest, write_tensors
from flexmoe_jax.params import ranks_of
from flexmoe_jax.tokenizer_files import GENERATION_CONFIG, TOKENIZER_CONFIG, stored
from flexmoe_jax.tree import PUBLIC, TRUNK, check_known

FORMAT = "flexmoe-export-1"
MODEL_FILE = "modeling_flexmoe.py"
_CHECK_DISK = "`flexmoe verify` says whether the model is damaged; if it is not, check the disk and export again"
Leaves = Mapping[str, Mapping[str, np.ndarray]]  # {owner: {path: array}}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export holds and how it is checked; the defaults export the whole model."""

    experts: Iterable[str] | None = None
    """Names of the experts to export; None: all."""

    dense: bool = False
    """Write a single expert as a dense model, without its router row. An expert whose router row is 0, such as that of
    an imported dense model, becomes a dense model in any case."""

    custom_code: bool = False
    """Ship a model file that adds the experts' bias to the router, which `FlexOlmoForCausalLM` does not have."""

    zero_bias: Mapping[str, Any] | None = None
    """Leave the experts' bias out. The value says what that costs, as measured; config.json and model card state it."""

    evaluation: Mapping[str, Any] | None = None
    """A result of `flexmoe eval --json`, for the model card."""

    max_shard_bytes: int = 5 << 30
    """Size of the largest weight file."""

    check_logits: bool = False
    """Load the export with transformers and compare logits (hf/check.py); both models are then in memory."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What `export` wrote: `files` are the weight files, `logits_difference` the result of `check_logits`."""

    path: pathlib.Path
    architecture: Architecture
    experts: tuple[str, ...]
    top_k: int
    files: tuple[str, ...]
    logits_difference: float | None = None


def export(model: ModelDir, out: pathlib.Path | str, options: ExportOptions = ExportOptions()) -> Export:
    """Writes the checkpoint at the new directory `out` and reads it back: every part must have its manifest's sha256.

    Raises ArtifactError for a damaged package, for experts that no class of `transformers` can hold, and for a negative
    bias unless `options` say what to do with it. When anything fails, `out` does not appear.
    """
    names = model.experts if options.experts is None else check_known(options.experts, model.experts)
    if options.dense and len(names) != 1:
        raise ArtifactError(f"a dense model of {len(names)} experts: {', '.join(names)}", "choose one with --experts")
    check_no_head_changes(model, names)
    leaves = {owner: _map_leaves(model, owner) for owner in (TRUNK, *names)}
    low = [name for name in names if ranks_of(leaves[name])]
    if low:  # their matrices are computed, so the parts are compared with their digests now and not when read back
        public = load_package(model.package(PUBLIC), digest=model.manifests[PUBLIC].digest, mapped=True)
        for name in low:
            expert = load_package(model.package(name), digest=model.manifests[name].digest, mapped=True)
            leaves[name] = whole_expert(name, expert, public, mapped=True)
    biased = _biased_layers(leaves, names)
    mixture = len(names) > 1 or (not options.dense and bool(np.any(leaves[names[0]]["router"] != 0)))
    origin = model.manifests[TRUNK].record.fields.get("imported", {}).get("config", {}).get("model_type")
    architecture = architecture_of(model.config, mixture, bool(biased) and options.custom_code, origin)
    if biased and len(names) > 1 and not options.custom_code and options.zero_bias is None:
        custom = "--custom-code ships a model file that adds it (load with trust_remote_code=True); "
        raise ArtifactError(
            f"{architecture.name} has no expert bias, and this model has one: "
            + "; ".join(f"{name} in layers {', '.join(map(str, layers))}" for name, layers in biased.items()),
            (custom if has_bias(model.config) else "")
            + "--zero-bias with --data leaves it out and prints what that costs",
        )
    table = slots(model.config, architecture, names)
    tensors = {name: _tensor(slot, leaves) for name, slot in table.items()}
    provenance = _provenance(model, names, options.zero_bias if biased else None)
    with new_directory(pathlib.Path(out)) as folder:
        files = write_tensors(folder, tensors, options.max_shard_bytes)
        _write_configs(folder, model, architecture, tensors, provenance)
        if architecture.bias:
            write_bytes(folder / MODEL_FILE, pathlib.Path(__file__).with_name(MODEL_FILE).read_bytes())
        text = card.model_card(model, names, architecture, provenance, options.evaluation)
        write_bytes(folder / "README.md", text.encode())
        _check_written(folder, model, table, leaves)
        difference = None
        if options.check_logits:
            difference = compare_logits(
                folder,
                model,
                names,
                custom_code=architecture.bias,
                leave_out_bias=options.zero_bias is not None,
            )
    return Export(pathlib.Path(out), architecture, names, min(model.top_k, len(names)), tuple(files), difference)


def _map_leaves(model: ModelDir, owner: str) -> dict[str, np.ndarray]:
    """{path: array} of the owner's package; bytes stay on the disk until they are used.

    Router and bias, which decide the form of the export and may be left out of it, are checked here.
    """
    package, manifest = model.package(owner), model.manifests[owner]
    raise_problems(package, check_files(package, manifest))
    leaves = {path: map_array(package, path, t.shape, t.dtype) for path, t in manifest.tensors.items()}
    for path in ("router", "bias"):
        if path in leaves:
            _check(model, owner, path, sha256_array(leaves[path]))
    return leaves


def _check(model: ModelDir, owner: str, path: str, found: str) -> None:
    """Raises ArtifactError unless the sha256 `found` is that of the part in the owner's manifest."""
    if found != (expected := model.manifests[owner].tensors[path].sha256):
        what = f"{model.package(owner)}: {path} was exported with the sha256 {found}, its manifest says {expected}"
        raise ArtifactError(what, _CHECK_DISK)


def _biased_layers(leaves: Leaves, names: tuple[str, ...]) -> dict[str, list[int]]:
    """{expert: the layers in which min(bias, 0) is not 0}."""
    layers = {name: np.flatnonzero(np.asarray(leaves[name]["bias"], np.float32) < 0).tolist() for name in names}
    return {name: found for name, found in layers.items() if found}


def _tensor(slot: Slot, leaves: Leaves) -> Tensor:
    """The checkpoint's tensor at `slot`; its bytes are read when they are written."""
    parts = {owner: leaves[owner][slot.path] for owner in slot.owners}
    # Owners may have stored their rows in different dtypes: the widest holds them all exactly.
    dtype = widest(part.dtype.name for part in parts.values())

    def read() -> np.ndarray:
        layers = {owner: part if slot.layer is None else part[slot.layer] for owner, part in parts.items()}
        return slot.join({owner: np.asarray(layer, dtype) for owner, layer in layers.items()})

    return Tensor(dtype, slot.shape, read)


def _provenance(model: ModelDir, names: tuple[str, ...], zero_bias: Mapping[str, Any] | None) -> dict[str, Any]:
    """The object under `flexmoe` in config.json: a function of the exported packages, not of the model's history."""
    owners = {
        name: {"content": model.manifests[name].content, "record": model.manifests[name].record.fields}
        for name in (TRUNK, *names)
    }
    wanted = None if model.wanted_top_k is None else min(model.wanted_top_k, len(names))
    fields = {"format": FORMAT, "names": list(names), "top_k": wanted, "owners": owners}
    return fields | {
        "tokenizer": list(model.tokenizer),
        "bias_left_out": None if zero_bias is None else dict(zero_bias),
    }


def _write_configs(
    folder: pathlib.Path,
    model: ModelDir,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Writes config.json, generation_config.json and the tokenizer; keys of an imported model's own files stay."""
    source = model.manifests[TRUNK].record.fields.get("imported", {})
    tokenizer = load_tokenizer(model.tokenizer_files)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    config = write_config(
        architecture,
        model.config,
        len(provenance["names"]),
        model.top_k,
        dtypes.pop() if len(dtypes) == 1 else "float32",
        {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id},
        source.get("config", {}),
        provenance,
    )
    write_json(folder / "config.json", config)
    if GENERATION_CONFIG not in model.tokenizer:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        generation = source.get("generation_config") or {"_from_model_config": True, **ids}
        write_json(folder / GENERATION_CONFIG, generation)
    for name, content in model.tokenizer_files.items():
        write_bytes(folder / name, stored(name, content))
    if TOKENIZER_CONFIG not in model.tokenizer:
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokenizer.decode([i]) for name, i in names.items() if i is not None},
            "model_max_length": model.config.max_seq_len,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / TOKENIZER_CONFIG, fields)


def _check_written(folder: pathlib.Path, model: ModelDir, table: Mapping[str, Slot], leaves: Leaves) -> None:
    """Raises ArtifactError unless the folder, read as an import reads it, holds exactly the parts of the manifests.

    Matrices that a low-rank change was added to have no digest there: they are compared with `leaves`.
    """
    found = open_folder(folder).tensors
    if found.keys() != table.keys():
        names = ", ".join(sorted(found.keys() ^ table.keys()))
        raise ArtifactError(f"{folder}: tensors read back differ from those written: {names}", _CHECK_DISK)
    places: dict[tuple[str, str], list[str]] = {}  # {part: names of its layers, in their order}
    for name, slot in sorted(table.items(), key=lambda item: item[1].layer or 0):
        for owner in slot.owners:
            places.setdefault((owner, slot.path), []).append(name)
    for (owner, path), layers in places.items():
        part, hasher = model.manifests[owner].tensors.get(path), hashlib.sha256()
        if part is None:
            for number, name in enumerate(layers):
                made = leaves[owner][path][number]
                if not np.array_equal(table[name].split(found[name].read(), made.shape)[owner], made):
                    raise ArtifactError(f"{folder}: {name} is not what was written", _CHECK_DISK)
            continue
        for name in layers:
            shape = part.shape if table[name].layer is None else part.shape[1:]
            layer = table[name].split(found[name].read(), shape)[owner]
            stored = np.ascontiguousarray(layer, NUMPY_DTYPES[part.dtype])  # rows of a router may have been widened
            hasher.update(stored.reshape(-1).view(np.uint8).data)
        _check(model, owner, path, hasher.hexdigest())
