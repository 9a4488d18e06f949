"""The next-token loss from hidden states, without the array of all logits [B, T, V].

Logits and their softmax are the largest arrays of a small model's training step. Here they exist for a few tokens at a
time. The forward pass also computes the derivatives that are wanted, while it has the logits; the backward pass only
scales them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flexmoe_jax.model.precision import EXACT
from flexmoe_jax.model.products import cpu_form, matmul, matmul_transposed, row_sums
from flexmoe_jax.parallel.mesh import platform

CHUNK_LOGITS = 1 << 21  # logits in one chunk on a CPU: 8 MB in float32 stay in its cache
ACCELERATOR_CHUNKS = 8  # on other platforms: a few large products, an eighth of the memory


def next_token_loss(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, D], head [D, V], int targets [B, T], float32 weights [B, T] -> (total, nll [B, T], log_z [B, T]).

    total = sum(weights * (nll + z_loss * log_z^2)), nll = log_z - logits[target], log_z = logsumexp(logits),
    logits = x head; all in nats and float32. Only `total` has a derivative, and only with respect to x and the head.
    """
    head_DV = head_DV if cpu_form() else head_DV.astype(x_BTD.dtype)  # on a CPU its gradient is float32 as it is
    total, nll_BT, log_z_BT = _loss(x_BTD, head_DV, targets_BT, weights_BT, z_loss)
    return total, jax.lax.stop_gradient(nll_BT), jax.lax.stop_gradient(log_z_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> tuple:
    losses, _, _ = _scan(x_BTD, head_DV, targets_BT, weights_BT, z_loss, want_x=False, want_head=False)
    return losses


def _loss_fwd(x_BTD: Any, head_DV: Any, targets_BT: Any, weights_BT: Any, z_loss: float) -> tuple:
    losses, dx_BTD, dhead_DV = _scan(
        x_BTD.value, head_DV.value, targets_BT.value, weights_BT.value, z_loss, x_BTD.perturbed, head_DV.perturbed
    )
    return losses, (dx_BTD, dhead_DV)


def _loss_bwd(z_loss: float, residuals: tuple, cotangents: tuple) -> tuple:
    scaled = [None if d is None else (d.astype(jnp.float32) * cotangents[0]).astype(d.dtype) for d in residuals]
    return (*scaled, None, None)


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _scan(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    want_x: bool,
    want_head: bool,
) -> tuple:
    """((total, nll, log_z), dtotal/dx or None, dtotal/dhead or None); scans over chunks of tokens of every row."""
    B, T, D = x_BTD.shape
    V, head_dtype = head_DV.shape[1], head_DV.dtype
    chunks = -(-B * T * V // CHUNK_LOGITS) if platform() == "cpu" else ACCELERATOR_CHUNKS
    t = -(-T // min(chunks, T))
    count = -(-T // t)

    head_DV = head_DV.astype(x_BTD.dtype)

    def cut(a):
        padded = jnp.pad(a, ((0, 0), (0, count * t - T), *((0, 0) for _ in a.shape[2:])))
        return jnp.moveaxis(padded.reshape(B, count, t, *a.shape[2:]), 1, 0)

    def one(dhead_DV, chunk):
        x_BtD, targets_Bt, weights_Bt = chunk
        logits_BtV = matmul(x_BtD, head_DV, jnp.float32, EXACT)
        most_Bt1 = logits_BtV.max(-1, keepdims=True)
        exp_BtV = jnp.exp(logits_BtV - most_Bt1)
        sum_Bt1 = exp_BtV.sum(-1, keepdims=True)
        log_z_Bt = (jnp.log(sum_Bt1) + most_Bt1)[..., 0]
        nll_Bt = log_z_Bt - jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        dx_BtD = None
        if want_x or want_head:
            scale_Bt1 = (weights_Bt * (1 + 2 * z_loss * log_z_Bt))[..., None] / sum_Bt1
            target_BtV = jnp.arange(V) == targets_Bt[..., None]
            # The barrier stops XLA from computing this once for each of the two products, and from moving a transposed
            # copy of the whole head out of the loop.
            dlogits_BtV = exp_BtV * scale_Bt1 - jnp.where(target_BtV, weights_Bt[..., None], 0)
            dlogits_BtV, w_DV = jax.lax.optimization_barrier((dlogits_BtV.astype(x_BtD.dtype), head_DV))
            if want_x:
                dx_BtD = matmul_transposed(dlogits_BtV, w_DV, x_BtD.dtype)
            if want_head:
                rows = x_BtD.reshape(-1, D), dlogits_BtV.reshape(-1, V)
                dhead_DV = dhead_DV + row_sums(*rows, jnp.float32)
        return dhead_DV, (nll_Bt, log_z_Bt, dx_BtD)

    def join(a):
        return None if a is None else jnp.moveaxis(a, 0, 1).reshape(B, count * t, *a.shape[3:])[:, :T]

    initial = jnp.zeros((D, V), jnp.float32) if want_head else None
    dhead_DV, parts = jax.lax.scan(one, initial, (cut(x_BTD), cut(targets_BT), cut(weights_BT)))
    nll_BT, log_z_BT, dx_BTD = map(join, parts)
    total = (weights_BT * (nll_BT + z_loss * log_z_BT**2)).sum()
    return (total, nll_BT, log_z_BT), dx_BTD, None if dhead_DV is None else dhead_DV.astype(head_dtype)
