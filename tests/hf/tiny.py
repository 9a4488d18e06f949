"""Tiny random checkpoints of `transformers` and models of ours, on disk."""

import dataclasses
import functools
import json
import pathlib
import struct

import jax
import numpy as np

from flexmoe_jax.artifacts.model_dir import ModelDir, create_model
from flexmoe_jax.artifacts.package import write_package
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.hf.architectures import FLEX_OLMO, Architecture
from flexmoe_jax.hf.configuration import write_config
from flexmoe_jax.hf.mapping import slots
from flexmoe_jax.hf.tensors import Tensor, write_tensors
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import PUBLIC, TRUNK, select
from tests.tiny import random_params

CONFIG = ModelConfig(
    vocab_size=300, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40, max_seq_len=64
)
change = functools.partial(dataclasses.replace, CONFIG, pre_norm=True, norm_topk=True, rope_theta=1e4, norm_eps=1e-5)
LLAMA = change(qk_norm=False, tie_embeddings=True)
QWEN3 = change(qk_norm_per_head=True, head_dim=12)
SHAPES = {
    "flex_olmo": CONFIG,
    "olmo2": CONFIG,
    "llama": LLAMA,
    "mistral": change(qk_norm=False),
    "mixtral": change(qk_norm=False),
    "qwen2": change(qk_norm=False, qkv_bias=True),
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3,
    "smollm3": change(qk_norm=False, num_layers=4, rope_skip=2),
}


def tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Writes the tokenizer of 300 ids to `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    load_tokenizer("cl100k:300").save(folder / "tokenizer.json")
    return folder


def checkpoint(folder: pathlib.Path, kind: str, *, dtype="float32", experts: int = 3, top_k: int = 2, **save):
    """Writes a random model with `save_pretrained`, and a tokenizer; returns the model."""
    import torch

    from tests.model.hf_oracle import make_model

    model = make_model(kind, SHAPES[kind], experts, top_k).to(getattr(torch, dtype))
    tokenizer(folder)
    model.save_pretrained(folder, **save)
    return model


def our_model(
    folder: pathlib.Path, owners=("code", "news"), *, biased=False, top_k=None, config=CONFIG, files=None
) -> ModelDir:
    """`folder`/model: a public release and experts, random and merged; the parts are beside it."""
    params = random_params(config, (PUBLIC, *owners))
    params = jax.tree.map(np.asarray, params)
    for expert in params["experts"].values():
        if not biased:
            expert["bias"] = np.zeros_like(expert["bias"])
    record = {"licence": "Apache-2.0", "training": {"steps": 7, "tokens": 700, "privacy_budget": None}}
    release = create_model(
        folder / "release",
        select(params, [PUBLIC]),
        config,
        tokenizer(folder / "tokenizer") if files is None else files,
        {TRUNK: record, PUBLIC: record},
    )
    base = {name: release.manifests[name].content for name in (TRUNK, PUBLIC)} | {"tokenizer": release.tokenizer_digest}
    for name in owners:
        record = {"licence": f"{name}-licence", "contact": f"someone@{name}"}
        part = params["experts"][name]
        write_package(folder / name, owner=name, params=part, config=config, base=base, record=record)
    return merge(folder / "release", [folder / name for name in owners], folder / "model", top_k=top_k)


def tensor(array: np.ndarray) -> Tensor:
    return Tensor(array.dtype.name, array.shape, lambda: array)


def arrays(seed: int = 0, kind: Architecture = FLEX_OLMO, config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random weights of a checkpoint, of three experts if it is a mixture."""
    rng = np.random.default_rng(seed)
    table = slots(config, kind, ("public", "code", "news") if kind.mixture else ("public",))
    return {name: rng.standard_normal(slot.shape).astype(np.float32) for name, slot in table.items()}


def write(
    folder: pathlib.Path,
    weights: dict[str, np.ndarray],
    max_shard_bytes: int = 1 << 30,
    kind: Architecture = FLEX_OLMO,
    config: ModelConfig = CONFIG,
    experts: int = 3,
) -> pathlib.Path:
    """A checkpoint folder made without transformers."""
    tokenizer(folder)
    fields = write_config(kind, config, experts, 2, "float32", {}, {}, {})
    (folder / "config.json").write_text(json.dumps(fields))
    write_tensors(folder, {name: tensor(array) for name, array in weights.items()}, max_shard_bytes)
    return folder


def write_float64(path: pathlib.Path, name: str, array: np.ndarray) -> None:
    """Adds a tensor in double precision, which our writer lacks, to a safetensors file."""
    header, data = split_file(path)
    header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
    join_file(path, header, data + array.tobytes())


def split_file(path: pathlib.Path) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: pathlib.Path, header: dict | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_config(folder: pathlib.Path, **changes) -> None:
    """Changes keys of config.json; None removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
