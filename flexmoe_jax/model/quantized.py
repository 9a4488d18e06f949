"""Frozen weight matrices in int8 or nf4 while an expert trains beside them; the quantization is qwix's.

Blocks of 64 neighboring weights share a float32 scale, their largest absolute value: 1.06 bytes a weight in int8, 0.56
in nf4, whose 16 levels are quantiles of a normal distribution (Dettmers et al., QLoRA, arXiv 2305.14314, section 3). A
product takes a matrix in the compute dtype, which is made of the blocks where it is used and is not kept.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from qwix import QArray

DTYPES = ("int8", "nf4")
BLOCK = 64


def is_quantized(w: Any) -> bool:
    """Whether `w` is a quantized matrix, a pytree of two arrays, and not one array."""
    return hasattr(w, "qvalue")


def quantize(leaf: Any, dtype: str) -> "QArray":
    """The matrices `leaf` [L, ..., F], of which one layer is read at a time, in one of `DTYPES`; arrays of NumPy.

    Blocks lie along the last axis. Where 64 does not divide it they have the size of their greatest common divisor.
    """
    layers = [jax.device_get(_layer(np.asarray(leaf[n], np.float32), dtype)) for n in range(leaf.shape[0])]
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def quantized_shapes(leaf: Any, dtype: str) -> "QArray":
    """The shapes of `quantize(leaf, dtype)`; all that is read of `leaf` is its shape."""
    return jax.eval_shape(functools.partial(_blocks, dtype=dtype), jax.ShapeDtypeStruct(leaf.shape, jnp.float32))


def dequantize(w: "QArray", dtype: DTypeLike) -> jax.Array:
    """The matrix that stands for the blocks, computed in float32."""
    import qwix

    return qwix.dequantize(w).astype(dtype)


def _blocks(x: jax.Array, dtype: str) -> "QArray":
    import qwix

    last = x.ndim - 1
    block = math.gcd(BLOCK, x.shape[last])
    kind = jnp.int8 if dtype == "int8" else dtype
    return qwix.quantize(x, kind, channelwise_axes=range(last), tiled_axes={last: block})


_layer = jax.jit(_blocks, static_argnums=1)
