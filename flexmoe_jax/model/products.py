"""Matrix products, in the form that is fast on the platform a program is traced for; the rest of the model calls these.

On a CPU, XLA multiplies bfloat16 by the processor's own instructions only if the result is float32 and no operand is
read along its leading axis; other products are converted to float32 first. So every product here asks for a float32
result, which is rounded once, and transposes are arrays of their own in row-major order. Elsewhere XLA's own choice is
best, and nothing is forced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from flexmoe_jax.model.quantized import dequantize, is_quantized
from flexmoe_jax.parallel.mesh import platform, splits_work


def cpu_form() -> bool:
    """Whether the program that is being traced takes the form for a CPU: the one rule.

    Not on a mesh of several devices: XLA gathers an array whose layout is forced.
    """
    return platform() == "cpu" and not splits_work()


def matmul(x: jax.Array, w: jax.Array, dtype: DTypeLike, precision: jax.lax.Precision | None = None) -> jax.Array:
    """x w: x [..., D], w [D, F] -> [..., F] in `dtype`. Further axes of w are leading axes of both: a batch."""
    return _dot(x, w, -2, dtype, precision)


def matmul_transposed(y: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """y w^T: y [..., F], w [D, F] -> [..., D] in `dtype`. Further axes of w are leading axes of both: a batch."""
    return _dot(y, w, -1, dtype)


def row_sums(x: jax.Array, y: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x^T y, summed over rows, like the gradient of a weight: x [..., N, D], y [..., N, F] -> [..., D, F] in `dtype`.

    The narrower operand is the one that is transposed.
    """
    if x.shape[-1] <= y.shape[-1] or not cpu_form():
        return matmul(transposed(x), y, dtype)
    return transposed(matmul(transposed(y), x, dtype))


def transposed(x: jax.Array) -> jax.Array:
    """x [..., N, D] -> x^T [..., D, N]; on a CPU a copy in row-major order.

    A barrier alone would not do: XLA keeps the bytes and calls them column-major.
    """
    x = x.swapaxes(-1, -2)
    return _row_major(x) if cpu_form() else x


def as_bits(x: jax.Array) -> jax.Array:
    """A bfloat16 array as its bits, uint16, on a CPU; any other array unchanged.

    A loop over layers that reads or writes a stack of bfloat16 arrays converts the whole stack to float32. Bits have no
    derivative: they are for residuals and for frozen weights.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if cpu_form() and x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """The inverse of `as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def as_weight(w: Any, dtype: DTypeLike) -> jax.Array:
    """A weight matrix in `dtype`, of an array, of its bits, or of quantized blocks (model/quantized.py)."""
    return dequantize(w, dtype) if is_quantized(w) else from_bits(w).astype(dtype)


def is_frozen(w: Any) -> bool:
    """Whether a weight is held in a form that has no derivative."""
    return is_quantized(w) or w.dtype == jnp.uint16


@jax.custom_vjp
def project(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """(x w for each w): x [..., D], w [D, ...] -> [..., *...] in x's dtype; weights are in any form of `as_weight`.

    The derivative has one transposed copy of x for all weights, and one sum for x.
    """
    return tuple(matmul(x, _flat(w, x.dtype), x.dtype).reshape(*x.shape[:-1], *w.shape[1:]) for w in weights)


def _project_bwd(residuals: tuple, dys: tuple[jax.Array, ...]) -> tuple:
    x, weights = from_bits(residuals[0]), residuals[1]
    dys = tuple(dy.reshape(*x.shape[:-1], -1) for dy in dys)
    dx = functools.reduce(
        jnp.add, (matmul_transposed(dy, _flat(w, x.dtype), sum_dtype(x)) for dy, w in zip(dys, weights, strict=True))
    )
    return dx.astype(x.dtype), *(weight_gradient(x, dy, w) for dy, w in zip(dys, weights, strict=True))


project.defvjp(lambda x, *weights: (project(x, *weights), (as_bits(x), weights)), _project_bwd)


def weight_gradient(x: jax.Array, dy: jax.Array, w: Any) -> jax.Array | None:
    """The gradient of w in y = x w, in the shape and dtype of w; None if w is in a form that has none."""
    return None if is_frozen(w) else row_sums(_rows(x), _rows(dy), w.dtype).reshape(w.shape)


def _flat(w: Any, dtype: DTypeLike) -> jax.Array:
    return as_weight(w, dtype).reshape(w.shape[0], -1)


def sum_dtype(x: jax.Array) -> DTypeLike:
    """The dtype of products that are added up and then rounded to x's: float32 on a CPU, where they have it anyway."""
    return jnp.float32 if cpu_form() else x.dtype


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _dot(
    x: jax.Array, w: jax.Array, axis: int, dtype: DTypeLike, precision: jax.lax.Precision | None = None
) -> jax.Array:
    batch = tuple(range(w.ndim - 2))
    dimensions = (((x.ndim - 1,), (w.ndim + axis,)), (batch, batch))
    if not cpu_form():
        return jax.lax.dot_general(x, w, dimensions, precision, preferred_element_type=dtype)
    product = jax.lax.dot_general(x, w, dimensions, precision, preferred_element_type=jnp.float32)
    return _row_major(product).astype(dtype)  # XLA would move a later transpose into the operands, which is slow
