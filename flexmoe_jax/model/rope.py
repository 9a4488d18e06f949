"""Rotary position embedding, non-interleaved ("rotate half"), cos and sin in float32."""

import math

import jax
import jax.numpy as jnp

from flexmoe_jax.model_config import ModelConfig, RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[jax.Array, float]:
    """(radians per position of each pair of dimensions, float32 [K/2]; factor of cos and sin).

    The factor is 1 except with `yarn` (see `RopeScaling`).
    """
    plain = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return plain, 1.0
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow, 1.0
    length = scaling.original_max_seq_len
    assert length is not None  # RopeScaling refuses these kinds without it
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((length * plain / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
        return slow * (1 - kept) + plain * kept, 1.0
    kept = 1 - _ramp(head_dim, theta, length, scaling)
    factor = scaling.attention_factor
    return slow * (1 - kept) + plain * kept, 0.1 * math.log(scaling.factor) + 1 if factor is None else factor


def _ramp(head_dim: int, theta: float, length: int, scaling: RopeScaling) -> jax.Array:
    """How far each frequency is slowed down by `yarn`: 0 for fast dimensions, 1 for slow ones, linear between them."""

    def dimension(turns: float) -> float:
        """The pair of dimensions that turns so often in `length` positions."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = jnp.arange(head_dim // 2, dtype=jnp.float32)
    return jnp.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)


def rope_table(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integer positions [B, T] -> (cos, sin), each float32 [B, T, 1, K]."""
    turns, factor = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * turns
    angles = jnp.concatenate([angles, angles], axis=-1)
    if factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def of_layer(config: ModelConfig, rope: tuple[jax.Array, jax.Array], layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The table of one layer, an index: that of no rotation in layers without a rotary embedding (`rope_skip`)."""
    if config.rope_skip is None:
        return rope
    turns = (layer + 1) % config.rope_skip != 0
    return jnp.where(turns, rope[0], 1.0), jnp.where(turns, rope[1], 0.0)


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
