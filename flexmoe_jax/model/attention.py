"""Causal attention with grouped key/value heads, QK-norm and packed documents."""

import jax
import jax.numpy as jnp

from flexmoe_jax.model.norm import rms_norm
from flexmoe_jax.model.products import (
    as_bits,
    from_bits,
    matmul,
    matmul_transposed,
    project,
    row_sums,
)
from flexmoe_jax.model.rope import apply_rope
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import Params

BLOCKS = 8  # at most 1/16 of the products is above the diagonal
MIN_BLOCK = 128  # shorter blocks save less time than they take to compile
MAX_BLOCK, MOST_BLOCKS = 512, 16  # the scores of longer blocks take more memory than the rest of a layer


def cache_mask(positions_BT: jax.Array, length: int) -> jax.Array:
    """Integer positions [B, T] -> bool [B, T, S=length]: a query sees the cache slots up to its own position."""
    return jnp.arange(length) <= positions_BT[:, :, None]


def project_qkv(
    config: ModelConfig, block: Params, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, D] -> q [B, T, H, K], k and v [B, T, G, K], in x's dtype.

    Then, as the configuration has it, a bias is added (Qwen2.5), q and k are normalized (OLMo-2, Qwen3) and rotated.
    """
    q_BTHK, k_BTGK, v_BTGK = project(x_BTD, block["w_q"], block["w_k"], block["w_v"])
    if config.qkv_bias:
        q_BTHK, k_BTGK, v_BTGK = (
            x + block[name].astype(x.dtype) for x, name in ((q_BTHK, "b_q"), (k_BTGK, "b_k"), (v_BTGK, "b_v"))
        )
    if config.qk_norm:
        norm = rms_norm if config.qk_norm_per_head else _norm_heads
        q_BTHK = norm(q_BTHK, block["q_norm"], config.norm_eps)
        k_BTGK = norm(k_BTGK, block["k_norm"], config.norm_eps)
    return apply_rope(q_BTHK, *rope), apply_rope(k_BTGK, *rope), v_BTGK


def attend_documents(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Attention of every token to itself and the earlier tokens of its own document -> [B, T, H, K].

    Computed in blocks, which skips most of the masked triangle. Its own derivative recomputes the softmax, so that no
    array of size T * T is kept (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1). Softmax in float32.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BGRTK = (q_BTHK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGTK, v_BGTK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    y_BGRTK = _blocks(q_BGRTK, k_BGTK, v_BGTK, segments_BT)
    return y_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def attend(q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention to keys and values of a cache where bool `mask_BTS` is true (at least once per query) -> [B, T, H, K].

    Softmax in float32.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BGSK.shape[1]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGRTS = jnp.einsum("BTGRK,BGSK->BGRTS", q_BTGRK, k_BGSK, preferred_element_type=jnp.float32) * K**-0.5
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BGSK.dtype)
    return jnp.einsum("BGRTS,BGSK->BTGRK", weights_BGRTS, v_BGSK).reshape(B, T, H, K)


def block_length(T: int) -> int:
    """Queries of a block of a sequence of T tokens."""
    return min(max(-(-T // MOST_BLOCKS), min(-(-T // BLOCKS), MAX_BLOCK), MIN_BLOCK), T)


def _spans(T: int) -> list[tuple[int, int]]:
    block = block_length(T)
    return [(start, min(start + block, T)) for start in range(0, T, block)]


def _seen(segments_Bt: jax.Array, segments_Bs: jax.Array, offset: int) -> jax.Array:
    """bool [B, t, s]: the key is of the query's document and not later; the first query is `offset` after the key."""
    t, s = segments_Bt.shape[1], segments_Bs.shape[1]
    same_Bts = segments_Bt[:, :, None] == segments_Bs[:, None, :]
    return same_Bts & (offset + jnp.arange(t)[:, None] >= jnp.arange(s))


@jax.custom_vjp
def _blocks(q_BGRTK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return _blocks_fwd(q_BGRTK, k_BGTK, v_BGTK, segments_BT)[0]


def _blocks_fwd(
    q_BGRTK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, tuple]:
    """Each block of queries with all keys up to its end; the residuals are the inputs, the output and log-sum-exp."""
    outputs, log_sums = [], []
    for start, end in _spans(q_BGRTK.shape[3]):
        q, k, v = q_BGRTK[:, :, :, start:end], k_BGTK[:, :, :end], v_BGTK[:, :, :end]
        B, G, R, t, K = q.shape
        scores = matmul_transposed(q.reshape(B, G, R * t, K), k, jnp.float32).reshape(B, G, R, t, end)
        seen_Bts = _seen(segments_BT[:, start:end], segments_BT[:, :end], start)
        scores = jnp.where(seen_Bts[:, None, None], scores, -jnp.inf)
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        y = matmul(weights.astype(v.dtype).reshape(B, G, R * t, end), v, jnp.float32).reshape(q.shape) / total
        outputs.append(y.astype(v.dtype))
        log_sums.append(most + jnp.log(total))
    y_BGRTK, log_sum_BGRT = jnp.concatenate(outputs, axis=3), jnp.concatenate(log_sums, axis=3)[..., 0]
    kept = map(as_bits, (q_BGRTK, k_BGTK, v_BGTK, y_BGRTK))
    return y_BGRTK, (*kept, segments_BT, log_sum_BGRT)


def _blocks_bwd(residuals: tuple, dy_BGRTK: jax.Array) -> tuple:
    """Each block of keys with all queries from its start. Scores are [s, R * t]: keys in rows, queries in columns.

    So every product but that of dq has its operands in the order in which they lie in memory.
    """
    q_BGRTK, k_BGTK, v_BGTK, y_BGRTK = map(from_bits, residuals[:4])
    segments_BT, log_sum_BGRT = residuals[4:]
    product_BGRT = (dy_BGRTK.astype(jnp.float32) * y_BGRTK.astype(jnp.float32)).sum(-1)
    dq_BGRTK, dks, dvs = jnp.zeros(q_BGRTK.shape, jnp.float32), [], []
    for start, end in _spans(q_BGRTK.shape[3]):
        k, v = k_BGTK[:, :, start:end], v_BGTK[:, :, start:end]
        B, G, R, t, K = q_BGRTK[:, :, :, start:].shape
        q, dy = (a[:, :, :, start:].reshape(B, G, R * t, K) for a in (q_BGRTK, dy_BGRTK))
        log_sum, product = (a[:, :, None, :, start:] for a in (log_sum_BGRT, product_BGRT))
        seen_Bst = _seen(segments_BT[:, start:], segments_BT[:, start:end], 0).swapaxes(1, 2)
        scores, dweights = (
            matmul_transposed(a, b, jnp.float32).reshape(B, G, end - start, R, t) for a, b in ((k, q), (v, dy))
        )
        weights = jnp.where(seen_Bst[:, None, :, None], jnp.exp(scores - log_sum), 0)
        dscores = (weights * (dweights - product)).astype(q.dtype).reshape(B, G, end - start, R * t)
        dvs.append(matmul(weights.astype(dy.dtype).reshape(dscores.shape), dy, v.dtype))
        dks.append(matmul(dscores, q, k.dtype))
        dq = row_sums(dscores, k, jnp.float32).reshape(B, G, R, t, K)
        dq_BGRTK = dq_BGRTK.at[:, :, :, start:].add(dq)
    return dq_BGRTK.astype(q_BGRTK.dtype), jnp.concatenate(dks, axis=2), jnp.concatenate(dvs, axis=2), None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def project_out(block: Params, y_BTHK: jax.Array) -> jax.Array:
    """Heads [B, T, H, K] -> [B, T, D]."""
    B, T, H, K = y_BTHK.shape
    (x_BTD,) = project(y_BTHK.reshape(B, T, H * K), block["w_o"].reshape(H * K, block["w_o"].shape[-1]))
    return x_BTD


def _norm_heads(x_BTHK: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over all heads together: OLMo-2 normalizes the projection before it is split into heads."""
    B, T, H, K = x_BTHK.shape
    return rms_norm(x_BTHK.reshape(B, T, H * K), weight, eps).reshape(B, T, H, K)
