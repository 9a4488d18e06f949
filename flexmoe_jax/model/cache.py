"""The key/value cache of decoding: {"k", "v"}, each [L, B, G, S, K]; slot s holds position s of its row."""

import jax
import jax.numpy as jnp

from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.tree import Params


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str | jnp.dtype = jnp.float32) -> Params:
    """An empty cache: zeros [L, B=batch, G, S=length, K]."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def layer_of(k_BTGK: jax.Array, v_BTGK: jax.Array, length: int) -> Params:
    """One layer's {"k", "v"} [B, G, S=length, K] with these keys and values at positions 0 to T-1, then zeros."""

    def put(new_BTGK):
        return jnp.pad(new_BTGK.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - new_BTGK.shape[1]), (0, 0)))

    return {"k": put(k_BTGK), "v": put(v_BTGK)}


def write(cache: Params, layer: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> Params:
    """The cache with keys and values of one layer written at `positions_BT`; positions past the end are dropped."""
    row = jnp.arange(k_BTGK.shape[0])[:, None]

    def put(old, new: jax.Array):
        return old.at[layer, row, :, positions_BT].set(new.astype(old.dtype), mode="drop")

    return {"k": put(cache["k"], k_BTGK), "v": put(cache["v"], v_BTGK)}
