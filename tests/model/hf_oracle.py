"""The oracle of the golden tests: tiny random `transformers` models, and their weights in our tree.

The weights are copied by numpy alone, written out leaf by leaf and independent of the package's own importer.
"""

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.tree import PUBLIC, Params

CLASSES = {
    "flex_olmo": (transformers.FlexOlmoConfig, transformers.FlexOlmoForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def expert_names(count: int) -> tuple[str, ...]:
    """`public`, then owners in alphabetical order: our canonical order, HF's positions."""
    return (PUBLIC, *(f"owner-{i}" for i in range(1, count)))


def make_model(kind: str, config: ModelConfig, experts: int = 1, top_k: int = 1, seed: int = 0):
    """A float32 model of that shape: every matrix normal with standard deviation 1/sqrt(fan in), norms around 1."""
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
    """The model's weights as our named parameters; experts are named by `expert_names`, every bias is 0."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    L, D, F = config.num_layers, config.d_model, config.d_ff
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim

    def layers(name: str):
        return np.stack([weights[f"model.layers.{layer}.{name}"] for layer in range(L)])

    def heads(name: str, count: int):
        return layers(f"self_attn.{name}_proj.weight").transpose(0, 2, 1).reshape(L, D, count, K)

    before = kind == "llama"
    blocks = {
        "w_q": heads("q", H),
        "w_k": heads("k", G),
        "w_v": heads("v", G),
        "w_o": layers("self_attn.o_proj.weight").transpose(0, 2, 1).reshape(L, H, K, D),
        "attn_norm": layers(f"{'input' if before else 'post_attention'}_layernorm.weight"),
        "ffn_norm": layers(f"post_{'attention' if before else 'feedforward'}_layernorm.weight"),
    }
    if config.qk_norm:
        blocks |= {name: layers(f"self_attn.{name}.weight") for name in ("q_norm", "k_norm")}
    trunk = {
        "embed": weights["model.embed_tokens.weight"],
        "blocks": blocks,
        "final_norm": weights["model.norm.weight"],
    }
    if not config.tie_embeddings:
        trunk["head"] = weights["lm_head.weight"].T

    if kind == "flex_olmo":  # one fused leaf: the gate's F rows, then the up projection's
        gate_up = layers("mlp.experts.gate_up_proj")
        gate, up, down = gate_up[:, :, :F], gate_up[:, :, F:], layers("mlp.experts.down_proj")
        router = layers("mlp.gate.weight")
    else:
        gate, up, down = (layers(f"mlp.{name}_proj.weight")[:, None] for name in ("gate", "up", "down"))
        router = np.zeros((L, 1, D), np.float32)
    experts = {
        name: {
            "w_gate": gate[:, i].transpose(0, 2, 1),
            "w_up": up[:, i].transpose(0, 2, 1),
            "w_down": down[:, i].transpose(0, 2, 1),
            "router": router[:, i],
            "bias": np.zeros(L, np.float32),
        }
        for i, name in enumerate(expert_names(router.shape[1]))
    }
    return _arrays({"trunk": trunk, "experts": experts})


def _arrays(tree: dict) -> Params:
    return {k: _arrays(v) if isinstance(v, dict) else jnp.asarray(np.ascontiguousarray(v)) for k, v in tree.items()}
