"""From `config.json` to ModelConfig and back: architectures that fit our tree, and the values that keys must have."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from flexmoe_jax.config import ModelConfig, from_mapping
from flexmoe_jax.errors import ArtifactError

PROVENANCE = "flexmoe"  # our key in config.json; unknown keys survive transformers


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class of `transformers`, or of the model file that exports ship, and the decoder that it implements.

    `default_theta` is the rotary base where config.json has none. `mixture` has a router over experts, `bias` a router
    that adds the experts' bias.
    """

    name: str
    model_type: str
    default_theta: float
    pre_norm: bool = False
    mixture: bool = False
    bias: bool = False


FLEX_OLMO = Architecture("FlexOlmoForCausalLM", "flex_olmo", 5e5, mixture=True)
BIASED = Architecture("FlexMoEForCausalLM", "flexmoe", 5e5, mixture=True, bias=True)  # modeling_flexmoe.py
OLMO2 = Architecture("Olmo2ForCausalLM", "olmo2", 1e4)
LLAMA = Architecture("LlamaForCausalLM", "llama", 1e4, pre_norm=True)
ARCHITECTURES = {a.model_type: a for a in (FLEX_OLMO, BIASED, OLMO2, LLAMA)}

# Options that our decoder lacks: {key: the values it accepts}. A missing key counts as the first.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "sliding_window": (None,),
}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The content of a `config.json`. `fields` are its keys as read; a dense model has 1 expert and `top_k` None."""

    architecture: Architecture
    model: ModelConfig
    experts: int
    top_k: int | None
    fields: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """The object that our export wrote under `flexmoe`, {} in other checkpoints."""
        value = self.fields.get(PROVENANCE)
        return value if isinstance(value, dict) else {}


def read_config(fields: Mapping[str, Any], where: pathlib.Path | str = "config.json") -> CheckpointConfig:
    """Checks a `config.json` (old or new spelling of the rotary base) and reads the model's shape from it.

    Raises ArtifactError for an unknown architecture, a missing key, and an option that our decoder lacks.
    """
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise ArtifactError(
            f"{where}: model_type is {kind!r}", f"this version imports: {', '.join(sorted(ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES[kind]
    declared = fields.get("architectures") or [architecture.name]
    if declared != [architecture.name]:
        raise ArtifactError(f"{where}: architectures is {declared}", f"give a checkpoint of {architecture.name}")
    for key, allowed in _MUST_BE.items():
        if (value := fields.get(key, allowed[0])) not in allowed:
            raise ArtifactError(f"{where}: {key} is {value!r}", f"this decoder supports only {key} = {allowed[0]!r}")
    heads = _required(fields, "num_attention_heads", where)
    width = _required(fields, "hidden_size", where)
    experts = _required(fields, "num_experts", where) if architecture.mixture else 1
    top_k = _required(fields, "num_experts_per_tok", where) if architecture.mixture else None
    if top_k is not None and not (type(experts) is int and type(top_k) is int and 1 <= top_k <= experts):
        raise ArtifactError(
            f"{where}: num_experts_per_tok is {top_k} with num_experts {experts}",
            f"set num_experts_per_tok to a number from 1 to {experts}",
        )
    if fields.get("norm_topk_prob") and top_k != experts:
        raise ArtifactError(
            f"{where}: norm_topk_prob is true",
            "give a FlexOlmo checkpoint: it does not renormalize the weights of the chosen experts",
        )
    model = from_mapping(
        ModelConfig,
        {
            "vocab_size": _required(fields, "vocab_size", where),
            "num_layers": _required(fields, "num_hidden_layers", where),
            "d_model": width,
            "num_heads": heads,
            "num_kv_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or width // heads,
            "d_ff": _required(fields, "intermediate_size", where),
            "max_seq_len": _required(fields, "max_position_embeddings", where),
            "rope_theta": _rope_theta(fields, architecture, where),
            "norm_eps": _required(fields, "rms_norm_eps", where),
            "pre_norm": architecture.pre_norm,
            "qk_norm": not architecture.pre_norm,
            "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        },
        str(where),
    )
    return CheckpointConfig(architecture, model, experts, top_k, dict(fields))


def architecture_of(model: ModelConfig, mixture: bool, biased: bool) -> Architecture:
    """The architecture of a model of this shape: a router over experts if `mixture`, which adds their bias if `biased`.

    Raises ArtifactError where `transformers` has no such class.
    """
    if model.pre_norm == model.qk_norm:
        raise ArtifactError(
            f"transformers has no class with pre_norm {model.pre_norm} and qk_norm {model.qk_norm}",
            "export a model of the OLMo-2 shape (False, True) or of the Llama shape (True, False)",
        )
    if model.pre_norm and mixture:
        raise ArtifactError(
            "transformers has no Llama-shaped mixture that keeps the weights of the chosen experts as they are",
            "export a single expert as a dense model: --experts public --dense",
        )
    return (BIASED if biased else FLEX_OLMO) if mixture else (LLAMA if model.pre_norm else OLMO2)


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
        "attention_bias": False,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
        PROVENANCE: dict(provenance),
    }
    if architecture.mixture:
        ours |= {"num_experts": experts, "num_experts_per_tok": min(top_k, experts), "norm_topk_prob": False}
    if architecture.pre_norm:
        ours |= {"mlp_bias": False}
    if architecture.bias:
        file = "modeling_flexmoe"
        ours["auto_map"] = {"AutoConfig": f"{file}.FlexMoEConfig", "AutoModelForCausalLM": f"{file}.{BIASED.name}"}
    old_spelling = ("rope_theta", "rope_scaling", "torch_dtype", "auto_map")
    of_experts = ("num_experts", "num_experts_per_tok", "norm_topk_prob")
    kept = {k: v for k, v in source.items() if k not in (*old_spelling, *of_experts)}
    return {**{key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}, **kept, **ours}


def _required(fields: Mapping[str, Any], key: str, where: pathlib.Path | str) -> Any:
    if fields.get(key) is None:
        raise ArtifactError(f"{where} has no {key}", "give the complete config.json of the checkpoint")
    return fields[key]


def _rope_theta(fields: Mapping[str, Any], architecture: Architecture, where: pathlib.Path | str) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ArtifactError(
            f"{where}: the rotary embedding is scaled ({kind!r})", "give a checkpoint with rope_type 'default'"
        )
    thetas = {float(t) for t in (rope.get("rope_theta"), fields.get("rope_theta")) if t is not None}
    if len(thetas) > 1:
        raise ArtifactError(f"{where}: rope_theta has the values {sorted(thetas)}", "keep one of them")
    return thetas.pop() if thetas else architecture.default_theta
