"""GGUF files of the Llama architecture, read as `LlamaForCausalLM` checkpoints.

llama.cpp quantizes weights, has its own tensor names, and orders the rows of query and key projections for an
interleaved rotary embedding; all three are undone here. Quantized tensors become float32.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmoe_jax.data.cl100k import SPLIT_PATTERN
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.hf.architectures import LLAMA
from flexmoe_jax.hf.checkpoint import Checkpoint
from flexmoe_jax.hf.configuration import read_config
from flexmoe_jax.hf.tensors import Tensor
from flexmoe_jax.tokenizer_files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    import gguf

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
_KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# {llama.cpp's name of a pre-tokenizer (llama-vocab.cpp): the same for the library `tokenizers`}.
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
}
_CONTROL = (3, 4)  # token types "control" and "user defined": matched as a whole, never merged


def open_gguf(path: pathlib.Path | str) -> Checkpoint:
    """A GGUF file as a checkpoint; its tokenizer is None unless it is a byte-level BPE with a known pre-tokenizer.

    Raises ArtifactError for a file that is not GGUF, another architecture, a scaled or partial rotary embedding and a
    duplicate tensor, ConfigError where the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading GGUF files needs the package gguf", "pip install 'flexmoe_jax[hf]'") from error
    path = pathlib.Path(path)
    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ArtifactError(f"{path} is not a GGUF file: {error}", "download it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ArtifactError(
            f"{path} has the architecture {fields.get('general.architecture')!r}, not 'llama'",
            "give a GGUF file of the Llama architecture",
        )
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = read_config(_configuration(fields, tied, path), path)
    heads = {"attn_q": config.model.num_heads, "attn_k": config.model.num_kv_heads}
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name in tensors:
            raise ArtifactError(f"{path} has the tensor {tensor.name!r} twice", "download it again")
        tensors[name] = _tensor(tensor, heads.get(tensor.name.split(".")[-2] if "." in tensor.name else ""))
    return Checkpoint(str(path), config, tensors, _tokenizer(fields), {})


def _configuration(fields: dict[str, Any], tied: bool, path: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of the same model."""

    def get(key: str, default: Any = None) -> Any:
        if (value := fields.get(f"llama.{key}", default)) is None:
            raise ArtifactError(f"{path} has no llama.{key}", "download it again, or convert the model again")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    scaling = get("rope.scaling.type", "none")
    if get("rope.dimension_count", width // heads) != width // heads:
        raise ArtifactError(
            f"{path} rotates {get('rope.dimension_count')} of {width // heads} dimensions of a head",
            "give a model that rotates all",
        )
    return {
        "model_type": LLAMA.model_type,
        "vocab_size": get("vocab_size", len(fields.get("tokenizer.ggml.tokens", []))),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "max_position_embeddings": get("context_length"),
        # Stored as float32: the shortest decimal that rounds to it restores the original (1e-5, not 9.99999975e-6).
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {
            "rope_theta": float(str(np.float32(get("rope.freq_base", 1e4)))),
            "rope_type": "default" if scaling == "none" else scaling,
        },
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _name(name: str) -> str:
    """The name in `transformers`; an unknown name stays as it is, and the import refuses it."""
    stem = name.removesuffix(".weight")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_LAYER[rest]}.weight" if rest in _LAYER else name


def _tensor(tensor: "gguf.ReaderTensor", heads: int | None) -> Tensor:
    """One tensor, dequantized when read; `heads` of a query or key projection says how its rows are reordered."""
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type.name

    def read() -> np.ndarray:
        if kind in ("F32", "F16"):
            array = np.array(tensor.data).reshape(shape)
        elif kind == "BF16":
            array = np.array(tensor.data).view("bfloat16").reshape(shape)
        else:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if heads is None:
            return array
        rows, width = shape
        return array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(shape)

    return Tensor(_KEPT.get(kind, "float32"), shape, read)


def _tokenizer(fields: dict[str, Any]) -> dict[str, bytes] | None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE; None for another kind: the import asks for one."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLIT:
        return None
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": i, "content": token, **flags}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in _CONTROL
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLIT[split]},
        "post_processor": None,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    ids = {
        name: fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    named = {name: tokens[i] for name, i in ids.items() if i is not None}
    if "bos_token" in named and fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        content["post_processor"] = _begin_with(named["bos_token"], int(ids["bos_token"] or 0))
    template = fields.get("tokenizer.chat_template")
    files = {TOKENIZER: json.dumps(content).encode(), TOKENIZER_CONFIG: json.dumps(named).encode()}
    return files | ({CHAT_TEMPLATE: template.encode()} if template else {})


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
