"""GGUF files of the Llama architecture, read as `LlamaForCausalLM` checkpoints.

llama.cpp quantizes weights, has its own tensor names, and orders the rows of query and key projections for an
interleaved rotary embedding; all three are undone here. Quantized tensors become float32.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from flexmoe_jax.data.cl100k import SPLIT_PATTERN, TO_BYTES, byte_level_bpe
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.foreign import short
from flexmoe_jax.hf import foreign
from flexmoe_jax.hf.architectures import LLAMA
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.configuration import read_config
from flexmoe_jax.hf.gguf_container import DOWNLOAD, read_container
from flexmoe_jax.hf.rope import write_scaling
from flexmoe_jax.hf.tensors import Tensor
from flexmoe_jax.model.rope import frequencies
from flexmoe_jax.model_config import RopeScaling
from flexmoe_jax.tokenizer_files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FREQUENCIES = "rope_freqs.weight"
# Keys `llama.*` whose other values our decoder lacks.
_MUST_BE: dict[str, Any] = {
    **dict.fromkeys(("expert_count", "expert_used_count"), 0),
    **dict.fromkeys(("attention.scale", "attention.max_alibi_bias", "attention.clamp_kqv"), 0.0),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "rope.scaling.attn_factor"), 1.0),
    **{"attention.causal": True, "use_parallel_residual": False},
}
_READ = {
    *_MUST_BE,
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
}
_PREFIX = "llama."
# Of Llama 3.1 to 3.3, the models that have it; the file keeps only the factor of each frequency.
_LLAMA3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
# {llama.cpp's name of a pre-tokenizer (llama-vocab.cpp): the same for the library `tokenizers`}.
_BYTES = TO_BYTES | {"use_regex": True}
_SPLIT = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
        TO_BYTES,
    ],
}
_CONTROL = (3, 4)  # token types "control" and "user defined": matched as a whole, never merged


def open_gguf(path: pathlib.Path | str) -> Checkpoint:
    """A GGUF file as a checkpoint; its tokenizer is None unless it is a byte-level BPE with a known pre-tokenizer.

    Raises ArtifactError for a file that is not GGUF or one of several, another architecture, a rotary embedding that
    the decoder lacks, and a duplicate tensor, ConfigError where the package `gguf` is missing.
    """
    path = foreign.existing(path)
    fields, found = read_container(path)
    _check_keys(fields, path)
    tied = "output.weight" not in found
    config = read_config(_configuration(fields, found, tied, path), path)
    heads = {"attn_q": config.model.num_heads, "attn_k": config.model.num_kv_heads}
    tensors: dict[str, Tensor] = {}
    for stored, tensor in found.items():
        name = _name(stored)
        if name in tensors:
            raise ArtifactError(f"{path} has the tensor {stored!r} twice", DOWNLOAD)
        tensors[name] = _ordered(tensor, heads.get(stored.split(".")[-2] if "." in stored else ""))
    tensors.pop(_FREQUENCIES, None)  # part of the configuration
    tokenizer, problem = _tokenizer(fields)
    unknown = sorted(key for key in fields if key.startswith(_PREFIX) and key.removeprefix(_PREFIX) not in _READ)
    stored, name = ", ".join(sorted({tensor.stored for tensor in found.values()})), config.architecture.name
    notes = [f"read {path}: {name}, {len(found)} tensors ({stored}; what is quantized becomes float32)"]
    if _FREQUENCIES in found:
        scaling = config.model.rope_scaling
        notes.append(f"{_FREQUENCIES} is read as {scaling or 'no scaling of the rotary embedding: its factors are 1'}")
    notes += [f"no tokenizer is read from it: {problem}"] if problem else []
    notes += [f"unknown keys passed over: {short(unknown)}"] if unknown else []
    return Checkpoint(str(path), config, tensors, tokenizer, {}, tuple(notes)).without_surplus()


def _check_keys(fields: dict[str, Any], path: pathlib.Path) -> None:
    """ArtifactError for another architecture, one of several files, and what our decoder does not compute."""
    single = ("general.architecture", "split.", _PREFIX)  # some architectures have a list of these, one for each layer
    for key in (key for key in fields if key.startswith(single) and isinstance(fields[key], list | np.ndarray)):
        raise ArtifactError(f"{path}: {key} is a list", "give a model whose layers are all of one shape")
    if (found := fields.get("general.architecture")) != "llama":
        what = f"{path} has the architecture {short(found)}, not 'llama'"
        raise ArtifactError(what, "give a GGUF file of the Llama architecture")
    if (count := fields.get("split.count", 1)) != 1:
        number = fields.get("split.no", 0)
        what = f"{path} is file {number + 1 if type(number) is int else short(number)} of {short(count)}"
        raise ArtifactError(what, "put them together first: llama-gguf-split --merge FIRST_FILE WHOLE.gguf")
    for key, value in _MUST_BE.items():
        if (given := fields.get(f"{_PREFIX}{key}", value)) != value:
            what = f"{path}: {_PREFIX}{key} is {short(given)}"
            raise ArtifactError(what, f"this decoder supports only {value!r}; import the safetensors of the model")


def _configuration(fields: dict[str, Any], found: dict[str, Tensor], tied: bool, path: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of the same model."""

    def get(key: str, default: Any = None, kind: type = int) -> Any:
        value = fields.get(f"{_PREFIX}{key}", default)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise ArtifactError(f"{path}: {_PREFIX}{key} is {short(value)}", "download it, or convert the model, again")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            what = f"{path}: a head has {head_dim} dimensions, and {_PREFIX}{key} is {get(key)}"
            raise ArtifactError(what, "give a model whose heads have one size and are rotated whole")
    embed = found.get("token_embd.weight")
    theta = float(str(np.float32(get("rope.freq_base", 1e4, float))))
    window = (
        {"sliding_window": get("attention.sliding_window")} if f"{_PREFIX}attention.sliding_window" in fields else {}
    )
    return {
        "model_type": "mistral" if window else LLAMA.model_type,
        "vocab_size": get("vocab_size", embed.shape[0] if embed and embed.shape else None),
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "max_position_embeddings": get("context_length"),
        # Stored as float32: the shortest decimal that rounds to it restores the original (1e-5, not 9.99999975e-6).
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon", None, float)))),
        "rope_parameters": {"rope_theta": theta, **_rope(fields, found.get(_FREQUENCIES), theta, head_dim, path)},
        "tie_word_embeddings": tied,
        **{
            f"{name}_token_id": token if type(token := fields.get(f"tokenizer.ggml.{key}_token_id")) is int else None
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
        **window,
    }


def _rope(
    fields: dict[str, Any], factors: Tensor | None, theta: float, head_dim: int, path: pathlib.Path
) -> dict[str, Any]:
    """The scaling of the rotary embedding as in a `config.json`; `factors` divide its frequencies."""
    factor = fields.get(f"{_PREFIX}rope.scaling.factor", fields.get(f"{_PREFIX}rope.scale_linear"))
    kind = fields.get(f"{_PREFIX}rope.scaling.type", "none" if factor is None else "linear")
    if kind not in ("none", "linear") or (kind == "linear" and (factor is None or factors is not None)):
        what = f"{path}: the rotary embedding is scaled ({short(kind)}) with the factor {short(factor)}"
        what += "" if factors is None else f" and {_FREQUENCIES}"
        raise ArtifactError(what, "import the safetensors of the model")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if factors is None:
        return {"rope_type": "default"}
    values = factors.read().astype(np.float64) if factors.shape == (head_dim // 2,) else np.zeros(1)
    if (values == 1).all():
        return {"rope_type": "default"}
    if values.min() >= 1 and np.isfinite(values).all():
        llama3 = dataclasses.replace(_LLAMA3, factor=float(values.max()))
        plain, scaled = (np.asarray(frequencies(head_dim, theta, how)[0]) for how in (None, llama3))
        if np.allclose(values, plain / scaled, rtol=1e-4):  # both are computed in float32; other lengths differ by 0.1
            return write_scaling(llama3)
    what = f"{path}: {_FREQUENCIES} is not the scaling 'llama3' of {_LLAMA3.original_max_seq_len} positions"
    raise ArtifactError(what, "import the safetensors of the model")


def _name(name: str) -> str:
    """The name in `transformers`; an unknown name stays as it is, and the import refuses it."""
    stem = name.removesuffix(".weight")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_LAYER[rest]}.weight" if rest in _LAYER else name


def _ordered(tensor: Tensor, heads: int | None) -> Tensor:
    """The tensor with its rows in the order of `transformers`; `heads` are those of a query or key projection."""
    if heads is None:
        return tensor

    def read() -> np.ndarray:
        rows, width = tensor.shape
        return tensor.read().reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(tensor.shape)

    return Tensor(tensor.dtype, tensor.shape, read)


def _tokenizer(fields: dict[str, Any]) -> tuple[dict[str, bytes] | None, str]:
    """(tokenizer.json and tokenizer_config.json of a byte-level BPE, ""), or (None, why the import asks for one)."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if not (isinstance(kind, str) and kind == "gpt2" and isinstance(split, str) and split in _SPLIT):
        return None, f"its kind is {short(kind)}, its pre-tokenizer {short(split)}"
    tokens, merges = (fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    types: Any = fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(merges, list) or np.shape(types) != (len(tokens),):
        return None, "it lacks tokens, a type of each token, or merges"
    if doubled := len(tokens) - len({*tokens}):
        return None, f"of its {len(tokens)} tokens {doubled} are given twice"
    ids = {
        f"{name}_token": fields[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if any(type(i) is not int or not 0 <= i < len(tokens) for i in ids.values()):
        return None, f"it names the ids {short(ids)} of {len(tokens)} tokens"
    specials = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in _CONTROL}
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ", 1) for merge in merges]
    content = byte_level_bpe(vocab, pairs, specials, _SPLIT[split], ignore_merges=split == "llama-bpe")
    content |= {"decoder": _BYTES}
    named = {name: tokens[i] for name, i in ids.items()}
    if "bos_token" in named and fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        content["post_processor"] = _begin_with(named["bos_token"], ids["bos_token"])
    files = {TOKENIZER: json.dumps(content).encode(), TOKENIZER_CONFIG: json.dumps(named).encode()}
    template = fields.get("tokenizer.chat_template")
    return files | ({CHAT_TEMPLATE: template.encode()} if isinstance(template, str) else {}), ""


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    """The part of a tokenizer.json that puts a token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{kind: {**value, "type_id": 1} for kind, value in part.items()} for part in (first, text)]
    second[1]["Sequence"]["id"] = "B"
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, *second],
        "special_tokens": known,
    }
