"""The next-token loss from hidden states, without the array of all logits [B, T, V].

Logits and their softmax are the largest arrays of a small model's training step. Here they exist for a few tokens at a
time. The forward pass also computes the derivatives that are wanted, while it has the logits; the backward pass only
scales them.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flexmoe_jax.model.precision import EXACT
from flexmoe_jax.model.products import cpu_form, matmul, matmul_transposed, row_sums
from flexmoe_jax.parallel.mesh import platform

CHUNK_LOGITS = 1 << 21  # logits in one chunk on a CPU: 8 MB in float32 stay in its cache
ACCELERATOR_CHUNKS = 8  # on other platforms: a few large products, an eighth of the memory


def next_token_loss(
    x_BTD: jax.Array, head: Sequence[jax.Array], targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, D], int targets [B, T], float32 weights [B, T] -> (total, nll [B, T], log_z [B, T]).

    total = sum(weights * (nll + z_loss * log_z^2)), nll = log_z - logits[target], log_z = logsumexp(logits); all in
    nats and float32. The logits are those of `head_product`. Only `total` has a derivative, and only with respect to x
    and the parts of the head.
    """
    if not cpu_form():  # on a CPU its gradient is float32 as it is
        head = [part.astype(x_BTD.dtype) for part in head]
    total, nll_BT, log_z_BT = _loss(x_BTD, tuple(head), targets_BT, weights_BT, z_loss)
    return total, jax.lax.stop_gradient(nll_BT), jax.lax.stop_gradient(log_z_BT)


def head_product(x_D: jax.Array, head: Sequence[jax.Array]) -> jax.Array:
    """float32 logits [..., V]: the sum of x's numbers times the rows of each part of the head, in this order.

    A part of zeros changes no bit.
    """
    parts = (matmul(x, w, jnp.float32, EXACT) for x, w in zip(_cut(x_D, head), head, strict=True))
    return functools.reduce(jnp.add, parts)


def _cut(x_D: jax.Array, head: Sequence[jax.Array]) -> list[jax.Array]:
    """x [..., D] in as many parts as the head, each as wide as that has rows."""
    ends = list(itertools.accumulate(len(part) for part in head))
    return [x_D[..., end - len(part) : end] for end, part in zip(ends, head, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x_BTD: jax.Array, head: tuple, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> tuple:
    losses, _, _ = _scan(x_BTD, head, targets_BT, weights_BT, z_loss, want_x=False, want_head=(False,) * len(head))
    return losses


def _loss_fwd(x_BTD: Any, head: tuple, targets_BT: Any, weights_BT: Any, z_loss: float) -> tuple:
    parts, wanted = (tuple(getattr(part, name) for part in head) for name in ("value", "perturbed"))
    losses, dx_BTD, dhead = _scan(
        x_BTD.value, parts, targets_BT.value, weights_BT.value, z_loss, x_BTD.perturbed, wanted
    )
    return losses, (dx_BTD, dhead)


def _loss_bwd(z_loss: float, residuals: tuple, cotangents: tuple) -> tuple:
    def scaled(d: jax.Array | None) -> jax.Array | None:
        return None if d is None else (d.astype(jnp.float32) * cotangents[0]).astype(d.dtype)

    dx_BTD, dhead = residuals
    return scaled(dx_BTD), tuple(map(scaled, dhead)), None, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _scan(
    x_BTD: jax.Array,
    head: tuple[jax.Array, ...],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    want_x: bool,
    want_head: tuple[bool, ...],
) -> tuple:
    """((total, nll, log_z), dtotal/dx or None, dtotal/dhead or None of each part); scans over chunks of tokens of every
    row."""
    B, T, _ = x_BTD.shape
    V, dtypes = head[0].shape[1], [part.dtype for part in head]
    chunks = -(-B * T * V // CHUNK_LOGITS) if platform() == "cpu" else ACCELERATOR_CHUNKS
    t = -(-T // min(chunks, T))
    count = -(-T // t)

    head = tuple(part.astype(x_BTD.dtype) for part in head)

    def cut(a):
        padded = jnp.pad(a, ((0, 0), (0, count * t - T), *((0, 0) for _ in a.shape[2:])))
        return jnp.moveaxis(padded.reshape(B, count, t, *a.shape[2:]), 1, 0)

    def one(dhead, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        logits_BtV = head_product(x_BtD, head)
        most_Bt1 = logits_BtV.max(-1, keepdims=True)
        exp_BtV = jnp.exp(logits_BtV - most_Bt1)
        sum_Bt1 = exp_BtV.sum(-1, keepdims=True)
        log_z_Bt = (jnp.log(sum_Bt1) + most_Bt1)[..., 0]
        nll_Bt = log_z_Bt - jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        dx_BtD = None
        if want_x or any(want_head):
            scale_Bt1 = (weights_Bt * (1 + 2 * z_loss * log_z_Bt))[..., None] / sum_Bt1
            target_BtV = jnp.arange(V) == targets_Bt[..., None]
            # The barrier stops XLA from computing this once for each of the two products, and from moving a transposed
            # copy of the whole head out of the loop.
            dlogits_BtV = exp_BtV * scale_Bt1 - jnp.where(target_BtV, weights_Bt[..., None], 0)
            dlogits_BtV, parts = jax.lax.optimization_barrier((dlogits_BtV.astype(x_BtD.dtype), head))
            if want_x:
                dx_BtD = jnp.concatenate([matmul_transposed(dlogits_BtV, w, x_BtD.dtype) for w in parts], axis=-1)
            dhead = [
                d if d is None else d + row_sums(x.reshape(-1, x.shape[-1]), dlogits_BtV.reshape(-1, V), jnp.float32)
                for d, x in zip(dhead, _cut(x_BtD, head), strict=True)
            ]
        return dhead, (nll_Bt, log_z_Bt, dx_BtD)

    def join(a):
        return None if a is None else jnp.moveaxis(a, 0, 1).reshape(B, count * t, *a.shape[3:])[:, :T]

    initial = [jnp.zeros(p.shape, jnp.float32) if want else None for p, want in zip(head, want_head, strict=True)]
    dhead, parts = jax.lax.scan(one, initial, (cut(x_BTD), cut(targets_BT), cut(weights_BT)))
    nll_BT, log_z_BT, dx_BTD = map(join, parts)
    total = (weights_BT * (nll_BT + z_loss * log_z_BT**2)).sum()
    gradients = tuple(d if d is None else d.astype(dtype) for d, dtype in zip(dhead, dtypes, strict=True))
    return (total, nll_BT, log_z_BT), dx_BTD, gradients
