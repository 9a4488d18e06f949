"""From `config.json` to ModelConfig and back: what keys must hold, what they imply, and which are passed over."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.foreign import short
from flexmoe_jax.hf.architectures import ARCHITECTURES, BIASED, Architecture
from flexmoe_jax.hf.rope import READ as ROPE_KEYS
from flexmoe_jax.hf.rope import read_rope, read_skip, write_rope
from flexmoe_jax.mapping import from_mapping, to_mapping
from flexmoe_jax.model_config import ModelConfig

PROVENANCE = "flexmoe"  # our key in config.json; unknown keys survive transformers

# Options that our decoder lacks, of any class: {key: the values it accepts}. A missing key counts as the first.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "query_pre_attn_scalar": (None,),
    "n_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({},),
}
# {field of ModelConfig: key}, which every checkpoint has.
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
}
# What a value may be, where the checks below do not say it: {types: keys}.
_TYPES: dict[tuple[type, ...], tuple[str, ...]] = {
    (int,): (
        *(*_SIZES.values(), "intermediate_size", "moe_intermediate_size", "num_key_value_heads", "head_dim"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "max_position_embeddings", "sliding_window"),
        "no_rope_layer_interval",
    ),
    (int, float): ("rms_norm_eps", "rope_theta"),
    (bool,): ("tie_word_embeddings", "norm_topk_prob", "use_sliding_window"),
    (dict,): ("rope_parameters", "rope_scaling", PROVENANCE),
    (list,): ("layer_types", "no_rope_layers", "architectures"),
    (str,): ("model_type",),
}
_LARGEST = 1 << 31  # of every size: a number of JSON may have thousands of digits
_OF_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")
_OF_WINDOW = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
# Of an imported configuration these do not stay: the model determines them, or their spelling is old.
_NOT_KEPT = {*ROPE_KEYS, *_OF_EXPERTS, "torch_dtype", "auto_map"}
_READ = {
    *_SIZES.values(),
    *_OF_EXPERTS,
    *_OF_WINDOW,
    *ROPE_KEYS,
    *_MUST_BE,
    *("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", PROVENANCE),
}
# Keys without effect on a forward pass: of training, of files and classes, of generation.
_WITHOUT_EFFECT = {
    *("initializer_range", "attention_dropout", "hidden_dropout", "use_cache", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise", "gradient_checkpointing", "output_attentions"),
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path"),
    *("_attn_implementation", "attn_implementation", "output_hidden_states", "return_dict", "problem_type"),
    *("id2label", "label2id", "num_labels", "is_decoder", "is_llama_config", "rope_interleaved"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "transformers.js_config"),
    *("do_sample", "temperature", "top_p", "top_k", "max_length", "chunk_size_feed_forward"),
}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The content of a `config.json`. `fields` are its keys as read; a dense model has 1 expert and `top_k` None.

    `notes` say what was filled in or passed over.
    """

    architecture: Architecture
    model: ModelConfig
    experts: int
    top_k: int | None
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """The object that our export wrote under `flexmoe`, {} in other checkpoints."""
        return self.fields.get(PROVENANCE) or {}


def read_config(fields: Mapping[str, Any], where: pathlib.Path | str = "config.json") -> CheckpointConfig:
    """Checks a `config.json` and reads the model's shape from it.

    A missing or null key has the value that `transformers` gives it, if it gives one. Raises ArtifactError for an
    unknown architecture, a missing key, and an option that our decoder lacks.
    """
    given, fields = dict(fields), {key: value for key, value in fields.items() if value is not None}
    _check_types(fields, where)
    _check_provenance(fields.get(PROVENANCE, {}), where)
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        known = f"this version imports: {', '.join(sorted(ARCHITECTURES))}"
        raise ArtifactError(f"{where}: model_type is {short(kind)}", known)
    architecture = ARCHITECTURES[kind]
    declared = fields.get("architectures", [architecture.name])
    if declared != [architecture.name]:
        raise ArtifactError(f"{where}: architectures is {short(declared)}", f"give a checkpoint of {architecture.name}")
    for key, allowed in {**_MUST_BE, **architecture.required}.items():
        if (value := fields.get(key, allowed[0])) not in allowed:
            raise ArtifactError(
                f"{where}: {key} is {short(value)}", f"this decoder supports only {key} = {allowed[0]!r}"
            )
    sizes = {name: _required(fields, key, where) for name, key in _SIZES.items()}
    experts = 1
    if architecture.mixture:  # transformers writes either key, whatever the class
        experts = _required(fields, _experts_key(fields, architecture), where)
    top_k = _required(fields, "num_experts_per_tok", where) if architecture.mixture else None
    if top_k is not None and top_k > experts:
        raise ArtifactError(
            f"{where}: num_experts_per_tok is {top_k} with {architecture.experts_key} {experts}",
            f"set num_experts_per_tok to a number from 1 to {experts}",
        )
    positions = fields.get("max_position_embeddings", architecture.positions)
    length = _full_attention(given, architecture, positions, where)
    theta, scaling = read_rope(fields, architecture, positions, where)
    values = {
        **sizes,
        "num_kv_heads": fields.get("num_key_value_heads", sizes["num_heads"]),
        "head_dim": fields.get("head_dim", sizes["d_model"] // sizes["num_heads"]),
        "d_ff": _required(fields, architecture.width_key, where),
        "max_seq_len": length,
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else to_mapping(scaling),
        "rope_skip": read_skip(fields, architecture, sizes["num_layers"], where),
        "norm_eps": fields.get("rms_norm_eps", architecture.eps),
        "tie_embeddings": bool(fields.get("tie_word_embeddings", architecture.tied)),
        "norm_topk": _norm_topk(architecture, fields),
        **architecture.decoder,
    }
    model = from_mapping(ModelConfig, values, str(where))
    return CheckpointConfig(architecture, model, experts, top_k, given, tuple(_notes(fields, architecture, model)))


def write_config(
    architecture: Architecture,
    model: ModelConfig,
    experts: int,
    top_k: int,
    dtype: str,
    ids: Mapping[str, int | None],
    source: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The `config.json` of an export.

    `experts` counts them, `dtype` is that of the weights. `source` is the configuration that the model was imported
    from: its keys stay where the model does not determine them (initializer range, dropout). `ids` are the special
    tokens that apply where `source` has none. `provenance` goes under `flexmoe`.
    """
    ours = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        **{key: getattr(model, name) for name, key in _SIZES.items()},
        architecture.width_key: model.d_ff,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        **write_rope(model),
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
        **{key: allowed[0] for key, allowed in architecture.required.items()},
        PROVENANCE: dict(provenance),
    }
    if architecture.mixture:
        ours |= {_experts_key(source, architecture): experts, "num_experts_per_tok": min(top_k, experts)}
        ours |= {"norm_topk_prob": model.norm_topk} if architecture.norm_topk is None else {}
    if architecture.bias:
        file = "modeling_flexmoe"
        ours["auto_map"] = {"AutoConfig": f"{file}.FlexMoEConfig", "AutoModelForCausalLM": f"{file}.{BIASED.name}"}
    defaults: dict[str, Any] = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if architecture.slides:
        defaults |= {"sliding_window": None}
    return {**defaults, **{key: value for key, value in source.items() if key not in _NOT_KEPT}, **ours}


def _check_types(fields: Mapping[str, Any], where: pathlib.Path | str) -> None:
    """Raises ArtifactError for a value of another type than its key has, and for a size that is not one."""
    for types, keys in _TYPES.items():
        for key in (key for key in keys if key in fields):
            value, words = fields[key], " or ".join(t.__name__ for t in types)
            if type(value) not in types:
                raise ArtifactError(f"{where}: {key} is {short(value)}", f"give a value of type {words}")
            if float in types and abs(value) > 1 << 62:
                raise ArtifactError(f"{where}: {key} is {short(value)}", "give the config.json as it was published")
            if types == (int,) and not 1 <= value <= _LARGEST:
                raise ArtifactError(f"{where}: {key} is {short(value)}", f"give a number from 1 to {_LARGEST}")


def _check_provenance(kept: Mapping[str, Any], where: pathlib.Path | str) -> None:
    """Raises ArtifactError unless the object under `flexmoe` has the form in which our export writes it."""
    names, top_k, owners = kept.get("names", []), kept.get("top_k"), kept.get("owners", {})
    tokenizer = kept.get("tokenizer", [])
    lists = all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in (names, tokenizer))
    parts = isinstance(owners, dict) and all(
        isinstance(part, dict) and isinstance(part.get("record", {}), dict) for part in owners.values()
    )
    if not (lists and parts and (top_k is None or type(top_k) is int)):
        what = f"{where}: {PROVENANCE} is {short(kept)}"
        raise ArtifactError(what, f"remove {PROVENANCE}, or give the config.json that `flexmoe export-hf` wrote")


def _experts_key(fields: Mapping[str, Any], architecture: Architecture) -> str:
    return next((key for key in ("num_experts", "num_local_experts") if key in fields), architecture.experts_key)


def _required(fields: Mapping[str, Any], key: str, where: pathlib.Path | str) -> Any:
    if key not in fields:
        raise ArtifactError(f"{where} has no {key}", "give the complete config.json of the checkpoint")
    return fields[key]


def _full_attention(
    fields: Mapping[str, Any], architecture: Architecture, positions: int, where: pathlib.Path | str
) -> int:
    """The longest sequence of which every layer sees the whole. ArtifactError where layers differ in that."""
    if kinds := [kind for kind in fields.get("layer_types") or () if kind != "full_attention"]:
        what = f"{where}: layer_types has {short(kinds)}"
        raise ArtifactError(what, "give a checkpoint whose layers all have full attention")
    if not fields.get("use_sliding_window", architecture.slides):
        return positions
    window = fields.get("sliding_window", architecture.window)
    return positions if window is None else min(positions, window)


def _norm_topk(architecture: Architecture, fields: Mapping[str, Any]) -> bool:
    if architecture.norm_topk is not None:
        return architecture.norm_topk
    return bool(fields.get("norm_topk_prob", False)) if architecture.mixture else architecture.pre_norm


def _notes(fields: Mapping[str, Any], architecture: Architecture, model: ModelConfig) -> list[str]:
    """What `read_config` filled in, limited or passed over."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    filled = {
        "max_position_embeddings": architecture.positions,
        "rms_norm_eps": architecture.eps,
        "rope_theta": architecture.theta,
    }
    lines = [
        f"config.json has no {key}: {value}, as in transformers"
        for key, value in filled.items()
        if key not in fields and key not in rope
    ]
    if model.max_seq_len < fields.get("max_position_embeddings", architecture.positions):
        lines.append(f"sequences are limited to {model.max_seq_len} tokens, the sliding window of its attention")
    unknown = {*fields} - _READ - _WITHOUT_EFFECT - {*architecture.required}
    return lines + ([f"unknown keys of config.json passed over: {short(sorted(unknown))}"] if unknown else [])
