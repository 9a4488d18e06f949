"""The oracle of the golden tests: tiny random `transformers` models, and their weights as our parameter tree.

The package's own importer converts the weights, so equal logits test the importer too.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.hf.checkpoint import open_folder
from flexmoe_jax.hf.load import read_tree
from flexmoe_jax.tree import PUBLIC, Params

CLASSES = {
    "flex_olmo": (transformers.FlexOlmoConfig, transformers.FlexOlmoForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def expert_names(count: int) -> tuple[str, ...]:
    """`public`, then owners in alphabetical order: names for HF's positions, in our canonical order."""
    return (PUBLIC, *(f"owner-{i}" for i in range(1, count)))


def make_model(kind: str, config: ModelConfig, experts: int = 1, top_k: int = 1, seed: int = 0):
    """A float32 model of this shape: matrices are normal with standard deviation 1/sqrt(fan in), norms around 1."""
    make_config, make = CLASSES[kind]
    mixture = {"num_experts": experts, "num_experts_per_tok": top_k} if kind == "flex_olmo" else {}
    hf_config = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **mixture,
    )
    model = make(hf_config).eval().requires_grad_(False)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        normal = rng.standard_normal(tuple(parameter.shape))
        scaled = 1 + 0.3 * normal if normal.ndim == 1 else normal / np.sqrt(normal.shape[-1])
        parameter.copy_(torch.from_numpy(scaled))
    return model


def to_tree(kind: str, model, config: ModelConfig) -> Params:
    """The model's weights as our named parameters, read from its saved files; experts named by `expert_names`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_folder(folder)
        read, params = read_tree(source, expert_names(source.config.experts))
    if read != config:
        raise AssertionError(f"the importer read {read} from the configuration of {config}")
    return jax.tree.map(jnp.asarray, params)
