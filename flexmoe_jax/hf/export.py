"""Exporting: a model directory becomes a checkpoint that `transformers` loads, tensor by tensor.

The packages' files are mapped, not read: memory stays at the largest single tensor, whatever the model's size.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexmoe_jax.artifacts.arrays import tensor_file
from flexmoe_jax.artifacts.model_dir import TOKENIZER, TOKENIZER_CONFIG, ModelDir
from flexmoe_jax.artifacts.package import check_files, raise_problems
from flexmoe_jax.artifacts.sealed import read_bytes
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.files import new_directory, write_bytes
from flexmoe_jax.hf import card
from flexmoe_jax.hf.check import compare_logits
from flexmoe_jax.hf.configuration import Architecture, architecture_of, write_config
from flexmoe_jax.hf.mapping import Slot, slots
from flexmoe_jax.hf.source import open_folder
from flexmoe_jax.hf.tensors import Tensor, write_checkpoint
from flexmoe_jax.tree import TRUNK, check_known

FORMAT = "flexmoe-export-1"
MAX_SHARD_BYTES = 5 << 30
MODEL_FILE = "modeling_flexmoe.py"


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written."""

    path: pathlib.Path
    architecture: Architecture
    experts: tuple[str, ...]
    top_k: int
    files: tuple[str, ...]
    logits_difference: float | None = None


def export(
    model: ModelDir,
    out: pathlib.Path | str,
    *,
    experts: Iterable[str] | None = None,
    dense: bool = False,
    custom_code: bool = False,
    zero_bias: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check_logits: bool = False,
) -> Export:
    """Writes the new directory `out`, after checking the digests of everything it takes; reads it back byte by byte.

    `experts` are those to export (all). One expert whose router row is 0, as an imported dense model's, becomes a dense
    model; `dense` makes one of any single expert, whose router row then has no use and is left out. A bias below 0 is
    refused, unless `custom_code` ships a model file that adds it or `zero_bias` (what was measured about it, recorded)
    leaves it out. `evaluation` is a result of `flexmoe eval --json`, for the model card. `check_logits` loads the
    export with transformers and compares logits before `out` appears (hf/check.py): both models are then in memory.
    """
    names = model.experts if experts is None else check_known(experts, model.experts)
    if dense and len(names) != 1:
        raise ArtifactError(f"a dense model of {len(names)} experts: {', '.join(names)}", "choose one with --experts")
    owners = (TRUNK, *names)
    for owner in owners:
        raise_problems(model.package(owner), check_files(model.package(owner), model.manifests[owner]))
    leaves = {owner: _map_leaves(model, owner) for owner in owners}
    biased = _biased_layers(leaves, names)
    if biased and len(names) > 1 and not custom_code and zero_bias is None:
        raise ArtifactError(
            "FlexOlmoForCausalLM has no expert bias, and this model has: "
            + "; ".join(f"{name} in layers {', '.join(map(str, layers))}" for name, layers in biased.items()),
            "--custom-code ships a model file that adds it (load with trust_remote_code=True); --zero-bias with --data "
            "leaves it out and prints what that costs",
        )
    mixture = len(names) > 1 or (not dense and bool(np.any(leaves[names[0]]["router"] != 0)))
    with_bias = bool(biased) and custom_code and mixture
    architecture = architecture_of(model.config, mixture, with_bias)
    tensors = {name: _plan(slot, leaves) for name, slot in slots(model.config, architecture, names).items()}
    provenance = _provenance(model, names, zero_bias if biased else None)
    source = model.manifests[TRUNK].record.fields.get("imported", {})
    dtypes = {tensor.dtype for tensor in tensors.values()}
    config = write_config(
        architecture,
        model.config,
        len(names),
        model.top_k,
        dtypes.pop() if len(dtypes) == 1 else "float32",
        _special_ids(model),
        source.get("config", {}),
        provenance,
    )
    with new_directory(pathlib.Path(out)) as folder:
        files = write_checkpoint(folder, tensors, max_shard_bytes)
        _write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        _write_json(
            folder / "generation_config.json",
            {"_from_model_config": True, **ids, **source.get("generation_config", {})},
        )
        _write_tokenizer(folder, model)
        if with_bias:
            shutil.copyfile(pathlib.Path(__file__).with_name(MODEL_FILE), folder / MODEL_FILE)
        write_bytes(folder / "README.md", card.model_card(model, names, architecture, provenance, evaluation).encode())
        _read_back(folder, tensors)
        difference = None
        if check_logits:
            leave_out = zero_bias is not None
            difference = compare_logits(folder, model, names, custom_code=with_bias, leave_out_bias=leave_out)
    return Export(pathlib.Path(out), architecture, names, min(model.top_k, len(names)), tuple(files), difference)


def _map_leaves(model: ModelDir, owner: str) -> dict[str, np.ndarray]:
    """{path: array} whose bytes stay on disk until they are used."""
    package = model.package(owner)
    return {
        path: np.memmap(package / tensor_file(path, tensor.shape), np.dtype(tensor.dtype), "r", shape=tensor.shape)
        for path, tensor in model.manifests[owner].tensors.items()
    }


def _biased_layers(leaves: Mapping[str, Mapping[str, np.ndarray]], names: tuple[str, ...]) -> dict[str, list[int]]:
    """{expert: layers whose min(bias, 0) is not 0}."""
    layers = {name: np.flatnonzero(np.asarray(leaves[name]["bias"], np.float32) < 0).tolist() for name in names}
    return {name: found for name, found in layers.items() if found}


def _plan(slot: Slot, leaves: Mapping[str, Mapping[str, np.ndarray]]) -> Tensor:
    parts = {owner: leaves[owner][slot.path] for owner in slot.owners}
    # The rows of one tensor may come from owners who stored other dtypes: the widest holds them all exactly.
    dtype = np.result_type(*(part.dtype for part in parts.values())) if slot.rows else parts[slot.owners[0]].dtype

    def read() -> np.ndarray:
        layers = {owner: part if slot.layer is None else part[slot.layer] for owner, part in parts.items()}
        return slot.join({owner: np.asarray(layer, dtype) for owner, layer in layers.items()})

    return Tensor(dtype.name, slot.shape, read)


def _provenance(model: ModelDir, names: tuple[str, ...], zero_bias: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json says of the origin: a function of the packages exported, not of the model's history."""
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


def _special_ids(model: ModelDir) -> dict[str, int]:
    tokenizer = load_tokenizer(model.path)
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _write_tokenizer(folder: pathlib.Path, model: ModelDir) -> None:
    for name in model.tokenizer:
        write_bytes(folder / name, read_bytes(model.path / name))
    if TOKENIZER_CONFIG not in model.tokenizer:
        tokenizer = load_tokenizer(model.path / TOKENIZER)
        _write_json(
            folder / TOKENIZER_CONFIG,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": tokenizer.decode([tokenizer.eos_id]),
                "pad_token": tokenizer.decode([tokenizer.pad_id]),
                "model_max_length": model.config.max_seq_len,
                "clean_up_tokenization_spaces": False,
            },
        )


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _read_back(folder: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises unless the folder, read as an import reads it, holds exactly the planned bytes."""
    found = open_folder(folder).tensors
    if found.keys() != tensors.keys():
        raise ArtifactError(f"{folder} holds other tensors than were written", "check the disk and export again")
    for name, tensor in tensors.items():
        if np.ascontiguousarray(tensor.read()).tobytes() != found[name].read().tobytes():
            raise ArtifactError(f"the tensor {name!r} was read back altered", "check the disk and export again")
