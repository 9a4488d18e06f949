"""RMSNorm as OLMo-2 computes it."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] in any float dtype, weight [D] -> [..., D] in x's dtype; computed in float32.

    The weight is multiplied before the cast back (transformers `Olmo2RMSNorm`).
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * weight.astype(jnp.float32)).astype(x.dtype)
