"""RMSNorm as in OLMo-2."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] in any float dtype, weight [D] -> [..., D] in x's dtype; computed in float32.

    The weight is applied before the cast back, as in `Olmo2RMSNorm` of transformers.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * weight.astype(jnp.float32)).astype(x.dtype)
