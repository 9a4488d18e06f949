"""The key/value cache of incremental decoding."""

import jax
import jax.numpy as jnp

from flexmoe_jax.config import ModelConfig


def init_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32):
    """Zeros {"k", "v"}, each [L, B, S=length, G, K]; slot s holds the token at position s of its row."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write(layer_cache, k_BTGK, v_BTGK, positions_BT):
    """One layer's cache {"k", "v"} [B, S, G, K] with the new keys and values put at `positions_BT`."""
    row = jnp.arange(k_BTGK.shape[0])[:, None]

    def put(old, new: jax.Array):
        return old.at[row, positions_BT].set(new.astype(old.dtype), mode="drop")

    return {"k": put(layer_cache["k"], k_BTGK), "v": put(layer_cache["v"], v_BTGK)}
