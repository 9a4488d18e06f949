"""Causal attention with grouped key/value heads, QK-norm and packed documents."""

import jax
import jax.numpy as jnp

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.model.norm import rms_norm
from flexmoe_jax.model.rope import apply_rope


def document_mask(segments_BT):
    """int32 document numbers [B, T] -> bool [B, T, T]: a token sees itself and the earlier tokens of its document."""
    T = segments_BT.shape[1]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTS & jnp.tril(jnp.ones((T, T), bool))


def cache_mask(positions_BT, length: int):
    """Positions [B, T] -> bool [B, T, S=length]: a query sees the cache slots up to its own position."""
    return jnp.arange(length) <= positions_BT[:, :, None]


def project_qkv(config: ModelConfig, block, x_BTD, rope):
    """x [B, T, D] -> q [B, T, H, K], k and v [B, T, G, K]; norm on the whole projection, then RoPE (OLMo-2)."""
    q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, block["w_q"].astype(x_BTD.dtype))
    k_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, block["w_k"].astype(x_BTD.dtype))
    v_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, block["w_v"].astype(x_BTD.dtype))
    if config.qk_norm:
        q_BTHK = _norm_heads(q_BTHK, block["q_norm"], config.norm_eps)
        k_BTGK = _norm_heads(k_BTGK, block["k_norm"], config.norm_eps)
    return apply_rope(q_BTHK, *rope), apply_rope(k_BTGK, *rope), v_BTGK


def attend(block, q_BTHK, k_BSGK, v_BSGK, mask_BTS):
    """Softmax attention (float32 inside) and the output projection -> [B, T, D]."""
    y_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None])
    return jnp.einsum("BTHK,HKD->BTD", y_BTHK, block["w_o"].astype(y_BTHK.dtype))


def _norm_heads(x_BTHK, weight, eps):
    """RMSNorm over all heads together: OLMo-2 normalises the projection before it is split into heads."""
    B, T, H, K = x_BTHK.shape
    return rms_norm(x_BTHK.reshape(B, T, H * K), weight, eps).reshape(B, T, H, K)
