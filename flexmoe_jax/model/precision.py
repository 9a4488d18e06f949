"""The precision policy: which products are float32 on every platform. It is set here, not left to JAX.

By default JAX multiplies float32 operands in TF32 on NVIDIA GPUs and in bfloat16 on TPUs.

- Router logits: float32 operands, multiplied and added in float32, forward and backward (`EXACT`).
- Logits of the vocabulary, in the loss, in scoring and in generation: operands in the compute dtype, multiplied and
  added in float32 (`EXACT`). Norms, softmax and log-sum-exp, which have no products, are computed in float32.
- Scoring (bits per byte, log-likelihoods, logits, routing): so are all products of the model (`exact`).
- All other products, those of layers in training and in generation and the derivatives of the head: operands in the
  compute dtype. In bfloat16 they are added in float32; in float32 the platform's default decides about the speed.

A product of two bfloat16 numbers is exact in float32, so `EXACT` changes nothing there: what is trained in bfloat16 is
scored with the same rounding by a `Decoder` of that dtype.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

EXACT = jax.lax.Precision.HIGHEST


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, traced so that its float32 products are float32 on every platform."""

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced
