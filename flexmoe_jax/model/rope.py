"""Rotary position embedding, non-interleaved ("rotate half"), cos and sin in float32."""

import jax
import jax.numpy as jnp


def rope_table(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Integer positions [B, T] -> (cos, sin), each float32 [B, T, 1, K]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def apply_rope(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the heads of x [B, T, H, K] by the table of their positions -> [B, T, H, K] in x's dtype.

    Computed in float32. The table is a constant: it has no derivative.
    """
    x = x_BTHK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_BTHK.dtype)


# The derivative of a rotation is the inverse rotation; automatic differentiation would make it paddings and sums.
apply_rope.defvjp(
    lambda x_BTHK, cos, sin: (apply_rope(x_BTHK, cos, sin), (cos, sin)),
    lambda table, dy_BTHK: (apply_rope(dy_BTHK, table[0], -table[1]), None, None),
)
