"""RMSNorm as in OLMo-2."""

import functools

import jax
import jax.numpy as jnp

from flexmoe_jax.model.products import as_bits, from_bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] in any float dtype, weight [D] -> [..., D] in x's dtype; computed in float32.

    The weight is applied before the cast back, as in `Olmo2RMSNorm` of transformers. The derivative keeps the input and
    one number per row.
    """
    return _rms_norm_fwd(x, weight, eps)[0]


def _rms_norm_fwd(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * weight.astype(jnp.float32)).astype(x.dtype), (as_bits(x), weight, inverse)


def _rms_norm_bwd(eps: float, residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits, weight, inverse = residuals
    x = from_bits(bits)
    dy32, normed = dy.astype(jnp.float32), x.astype(jnp.float32) * inverse
    dnormed = dy32 * weight.astype(jnp.float32)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dweight = (dy32 * normed).reshape(-1, weight.size).sum(0)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
