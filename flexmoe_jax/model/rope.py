"""Rotary position embedding, non-interleaved ("rotate half"), cos and sin in float32."""

import jax.numpy as jnp


def rope_table(positions_BT, head_dim: int, theta: float):
    """Integer positions [B, T] -> (cos, sin), each float32 [B, T, 1, K]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTHK, cos, sin):
    """Rotates the heads of x [B, T, H, K] by the table of their positions; computed in float32, in x's dtype."""
    x = x_BTHK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_BTHK.dtype)
