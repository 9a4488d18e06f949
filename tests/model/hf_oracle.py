"""The oracle of the golden tests: tiny random `transformers` models, and their weights as our parameter tree.

The package's own importer converts the weights, so equal logits test the importer too.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from flexmoe_jax.hf.architectures import ARCHITECTURES
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.load import read_tree
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import PUBLIC, Params

CLASSES = {
    "flex_olmo": "FlexOlmo",
    "olmo2": "Olmo2",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "smollm3": "SmolLM3",
}


def expert_names(count: int) -> tuple[str, ...]:
    """`public`, then owners in alphabetical order: names for HF's positions, in our canonical order."""
    return (PUBLIC, *(f"owner-{i}" for i in range(1, count)))


def make_model(kind: str, config: ModelConfig, experts: int = 1, top_k: int = 1, seed: int = 0):
    """A float32 model of this shape: matrices are normal with standard deviation 1/sqrt(fan in), norms around 1."""
    make_config, make = (getattr(transformers, CLASSES[kind] + end) for end in ("Config", "ForCausalLM"))
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope_parameters(config),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "sliding_window": None,
    }
    if ARCHITECTURES[kind].mixture:
        fields |= {"num_local_experts" if kind == "mixtral" else "num_experts": experts, "num_experts_per_tok": top_k}
    if kind in ("flex_olmo", "qwen3_moe"):
        fields |= {"norm_topk_prob": config.norm_topk}
    if kind == "qwen3_moe":
        fields |= {"moe_intermediate_size": config.d_ff}
    if kind == "smollm3":
        fields |= {"no_rope_layer_interval": config.rope_skip}
    hf_config = make_config(**fields)
    model = make(hf_config).eval().requires_grad_(False)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        normal = rng.standard_normal(tuple(parameter.shape))
        scaled = 1 + 0.3 * normal if normal.ndim == 1 else normal / np.sqrt(normal.shape[-1])
        parameter.copy_(torch.from_numpy(scaled))
    return model


def rope_parameters(config: ModelConfig) -> dict:
    """`config.rope_scaling` in the words of `transformers`."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    length = {} if scaling.kind == "linear" else {"original_max_position_embeddings": scaling.original_max_seq_len}
    more = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.kind]
    values = {name: getattr(scaling, name) for name in ("factor", *more) if getattr(scaling, name) is not None}
    return {"rope_type": scaling.kind, "rope_theta": config.rope_theta, **length, **values}


def to_tree(kind: str, model, config: ModelConfig) -> Params:
    """The model's weights as our named parameters, read from its saved files; experts named by `expert_names`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_folder(folder)
        read, params = read_tree(source, expert_names(source.config.experts))
    if read != config:
        raise AssertionError(f"the importer read {read} from the configuration of {config}")
    return jax.tree.map(jnp.asarray, params)
