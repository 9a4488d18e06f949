"""Expert feed-forward networks and two ways to run them: `dense` (the definition) and `sparse` (only the top-k).

Both take `(x_ND, routing, experts, layer=None)` and return sum_i weights_i(x) * FFN_i(x), shape [N, D], in x's dtype.
`experts` are one layer's weights, named {name: {w_gate [D, F], w_up [D, F], w_down [F, D]}} or stacked
{w_gate [E, D, F], ...}; with `layer`, an index, they are the stacked weights of all layers, [L, E, D, F]. A named
expert may hold a matrix as a low-rank change of the public expert's, `w_gate_a` [D, r] and `w_gate_b` [r, F].
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.model.products import (
    as_bits,
    as_weight,
    from_bits,
    is_frozen,
    matmul,
    matmul_transposed,
    row_sums,
    sum_dtype,
    weight_gradient,
)
from flexmoe_jax.model.router import Routing
from flexmoe_jax.parallel.mesh import platform
from flexmoe_jax.params import FFN_WEIGHTS, factors
from flexmoe_jax.tree import PUBLIC, Params, canonical_order

MIN_TILE_ROWS, MAX_TILE_ROWS = 32, 256


@jax.custom_vjp
def ffn(x_ND: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
    """W_down(silu(W_gate x) * (W_up x)) for x [N, D] -> [N, D] in x's dtype; weights are in any form of `as_weight`.

    The derivative is written by hand: it keeps the two projections, where automatic differentiation keeps four arrays
    of their size, and has one transposed copy of x. A row whose dy is 0 adds 0 to every gradient, even if weights or
    projections are not finite.
    """
    return _ffn_fwd(x_ND, w_gate, w_up, w_down)[0]


def _ffn_fwd(x_ND: jax.Array, *weights: jax.Array) -> tuple[jax.Array, tuple]:
    w_gate, w_up, w_down = (as_weight(w, x_ND.dtype) for w in weights)
    gate_NF, up_NF = (matmul(x_ND, w, x_ND.dtype) for w in (w_gate, w_up))
    y_ND = matmul(_gated(gate_NF, up_NF), w_down, x_ND.dtype)
    return y_ND, (as_bits(x_ND), weights, as_bits(gate_NF), as_bits(up_NF))


def _ffn_bwd(residuals: tuple, dy_ND: jax.Array) -> tuple:
    dx_ND, rows = _ffn_bwd_rows(residuals, dy_ND)
    return dx_ND, *(weight_gradient(*pair, w) for pair, w in zip(rows, residuals[1], strict=True))


def _ffn_bwd_rows(residuals: tuple, dy_ND: jax.Array) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
    """(dx [N, D], the inputs of each matrix with the gradients of its outputs)."""
    bits, weights, *projections = residuals
    x_ND, (gate_NF, up_NF) = from_bits(bits), map(from_bits, projections)
    w_gate, w_up, w_down = (as_weight(w, dy_ND.dtype) for w in weights)
    dhidden_NF = matmul_transposed(dy_ND, w_down, sum_dtype(dy_ND))
    used_N1 = _used(dy_ND)
    hidden_NF, dgate_NF, dup_NF = _gated_bwd(gate_NF, up_NF, dhidden_NF, used_N1)
    dx_ND = matmul_transposed(dgate_NF, w_gate, sum_dtype(dy_ND)) + matmul_transposed(dup_NF, w_up, sum_dtype(dy_ND))
    dx_ND = jnp.where(used_N1, dx_ND, 0)
    return dx_ND.astype(x_ND.dtype), ((x_ND, dgate_NF), (x_ND, dup_NF), (hidden_NF, dy_ND))


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32, in gate's dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _used(dy: jax.Array) -> jax.Array:
    """Whether a row of dy [..., D] is not 0, [..., 1]. An expert's output of weight 0 has dy = 0 (`_weighted`)."""
    return (dy != 0).any(-1, keepdims=True)


def _gated_bwd(gate: jax.Array, up: jax.Array, dhidden: jax.Array, used: jax.Array) -> tuple[jax.Array, ...]:
    """(hidden, dgate, dup) of hidden = silu(gate) * up, computed in float32, in gate's dtype; 0 in rows not `used`.

    `used` is bool [..., 1]: 0 times what is not finite would be NaN.
    """
    gate32, up32, dhidden32 = (x.astype(jnp.float32) for x in (gate, up, dhidden))
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    results = silu * up32, dhidden32 * up32 * (sigmoid + silu * (1 - sigmoid)), dhidden32 * silu
    return tuple(jnp.where(used, x, 0).astype(gate.dtype) for x in results)


ffn.defvjp(_ffn_fwd, _ffn_bwd)


@jax.custom_vjp
def changed_ffn(x_ND: jax.Array, matrices: tuple[tuple[jax.Array, ...], ...]) -> jax.Array:
    """`ffn` with each of the three matrices whole, (W,), or as a low-rank change of a fixed one, (W_public, A, B).

    W_public + A B is made in float32, once for all rows and once more for the derivative, which keeps no matrix and has
    products of width r only for those of A and B.
    """
    return _ffn_fwd(x_ND, *_whole(matrices, x_ND))[0]


def _changed_fwd(x_ND: jax.Array, matrices: tuple[tuple[jax.Array, ...], ...]) -> tuple[jax.Array, tuple]:
    y_ND, (bits, _, *projections) = _ffn_fwd(x_ND, *_whole(matrices, x_ND))
    return y_ND, (bits, matrices, projections)


def _changed_bwd(residuals: tuple, dy_ND: jax.Array) -> tuple:
    bits, matrices, projections = residuals
    dx_ND, rows = _ffn_bwd_rows((bits, _whole(matrices, dy_ND), *projections), dy_ND)
    return dx_ND, tuple(_matrix_gradient(*pair, matrix) for pair, matrix in zip(rows, matrices, strict=True))


def _whole(matrices: tuple[tuple[jax.Array, ...], ...], like: jax.Array) -> tuple[jax.Array, ...]:
    """The three matrices; those that are changed in the dtype of `like`."""

    def whole(w: jax.Array, *change: jax.Array) -> jax.Array:
        if not change:
            return w
        a, b = change
        return (as_weight(w, jnp.float32) + matmul(a, b, jnp.float32)).astype(like.dtype)

    return tuple(whole(*matrix) for matrix in matrices)


def _matrix_gradient(x_NI: jax.Array, dy_NO: jax.Array, matrix: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    """The gradients of (W,), or of (W_public, A, B): that of W_public is not taken."""
    if len(matrix) == 1:
        return (weight_gradient(x_NI, dy_NO, matrix[0]),)
    _, a_Ir, b_rO = matrix
    a_Ir, b_rO = a_Ir.astype(x_NI.dtype), b_rO.astype(x_NI.dtype)
    da_Ir = weight_gradient(x_NI, matmul_transposed(dy_NO, b_rO, x_NI.dtype), matrix[1])
    return None, da_Ir, weight_gradient(matmul(x_NI, a_Ir, x_NI.dtype), dy_NO, matrix[2])


changed_ffn.defvjp(_changed_fwd, _changed_bwd)


def is_stacked(experts: Params) -> bool:
    """Whether experts are stacked (arrays at the first level) rather than named."""
    return not isinstance(next(iter(experts.values())), Mapping)


def dense(x_ND: jax.Array, routing: Routing, experts: Params, layer: jax.Array | None = None) -> jax.Array:
    """Every expert runs on every token.

    An expert of weight zero reaches neither the output nor any gradient, even if it gives NaN.
    """
    if layer is not None:
        experts = {**experts, **{name: experts[name][layer] for name in FFN_WEIGHTS}}
    weights_EN = routing.weights_NE.T

    def add(total_ND, weight_and_expert):
        weight_N, expert = weight_and_expert
        y_ND = ffn(x_ND, *(expert[name] for name in FFN_WEIGHTS))
        return total_ND + _weighted(y_ND, weight_N[:, None]), None

    total_ND = jnp.zeros_like(x_ND)
    if is_stacked(experts):
        return jax.lax.scan(add, total_ND, (weights_EN, {name: experts[name] for name in FFN_WEIGHTS}))[0]
    for i, name in enumerate(canonical_order(experts)):
        if all(matrix in experts[name] for matrix in FFN_WEIGHTS):
            total_ND, _ = add(total_ND, (weights_EN[i], experts[name]))
        else:
            y_ND = changed_ffn(x_ND, _matrices(experts[name], experts[PUBLIC]))
            total_ND = total_ND + _weighted(y_ND, weights_EN[i][:, None])
    return total_ND


def _matrices(expert: Params, public: Params) -> tuple[tuple[jax.Array, ...], ...]:
    """Each matrix of an expert as `changed_ffn` takes it."""

    def matrix(name: str) -> tuple[jax.Array, ...]:
        return (expert[name],) if name in expert else (public[name], *(expert[leaf] for leaf in factors(name)))

    return tuple(map(matrix, FFN_WEIGHTS))


def sparse(x_ND: jax.Array, routing: Routing, experts: Params, layer: jax.Array | None = None) -> jax.Array:
    """Only the chosen experts run, and no token is dropped. FlexMoEError for named experts: stack them beforehand.

    Slots (a token's choice of an expert) are sorted by expert and pass through a grouped feed-forward network. With
    `layer` only that layer of the chosen experts is read: for decoding, whose cost is reading weights. That form has no
    derivative.
    """
    if not is_stacked(experts):
        raise FlexMoEError("sparse dispatch was given named experts", "stack them once, outside the forward pass")
    weights_Nk = jnp.take_along_axis(routing.weights_NE, routing.index_Nk, axis=-1)
    return run_slots(x_ND, routing.index_Nk, weights_Nk, tuple(experts[name] for name in FFN_WEIGHTS), layer)


def run_slots(
    x_ND: jax.Array,
    index_Nk: jax.Array,
    weights_Nk: jax.Array,
    weights: tuple[jax.Array, ...],
    layer: jax.Array | None = None,
) -> jax.Array:
    """sum over a token's k slots of weight * FFN_index(x), [N, D]; `weights` are those of E experts, stacked.

    `index_Nk` is int32, `weights_Nk` float32. Slots with the index E belong to no expert here: their weight must be
    zero, and they cost no product.
    """
    N, k = index_Nk.shape
    order_S, inverse_S, counts_E = _sort(index_Nk, weights[0].shape[0 if layer is None else 1])
    x_SD = _spread(x_ND, order_S, inverse_S)
    y_SD = GROUPED.get(platform(), _ragged)(x_SD, counts_E, weights, layer)
    y_NkD = _collect(y_SD, order_S, inverse_S).reshape(N, k, -1)
    return _weighted(y_NkD, weights_Nk[..., None]).sum(1)


@jax.custom_vjp
def _weighted(y_D: jax.Array, weight_1: jax.Array) -> jax.Array:
    """float32 weight [..., 1] times y [..., D] -> [..., D] in y's dtype.

    An expert of weight zero reaches neither the output nor, through the derivative, the router, even if it gives NaN.
    A weight that is NaN does: a broken router must show.
    """
    return jnp.where(weight_1 != 0, weight_1 * y_D.astype(jnp.float32), 0).astype(y_D.dtype)


def _weighted_bwd(residuals: tuple, dy_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    y_D, weight_1 = from_bits(residuals[0]), residuals[1]
    dweight_1 = (dy_D.astype(jnp.float32) * y_D.astype(jnp.float32)).sum(-1, keepdims=True)
    return _weighted(dy_D, weight_1), jnp.where(weight_1 != 0, dweight_1, 0)


_weighted.defvjp(lambda y_D, weight_1: (_weighted(y_D, weight_1), (as_bits(y_D), weight_1)), _weighted_bwd)


def _sort(index_Nk: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slots sorted by expert [S], each slot's place in that order [S], number of slots per expert [E]); S = N*k."""
    expert_S = index_Nk.reshape(-1)
    order_S = jnp.argsort(expert_S, stable=True)
    inverse_S = jnp.zeros_like(order_S).at[order_S].set(jnp.arange(order_S.size), unique_indices=True)
    return order_S, inverse_S, jnp.bincount(expert_S, length=E)


@jax.custom_vjp
def _spread(x_ND: jax.Array, order_S: jax.Array, inverse_S: jax.Array) -> jax.Array:
    """The tokens [S, D] of slots sorted by expert. The derivative is a gather too: a token's slots are summed."""
    return x_ND[order_S // (order_S.size // x_ND.shape[0])]


def _spread_bwd(residuals: tuple, dy_SD: jax.Array) -> tuple:
    inverse_S, N = residuals
    return dy_SD[inverse_S].reshape(N, -1, dy_SD.shape[-1]).sum(1), None, None


_spread.defvjp(
    lambda x_ND, order_S, inverse_S: (_spread(x_ND, order_S, inverse_S), (inverse_S, len(x_ND))), _spread_bwd
)


@jax.custom_vjp
def _collect(y_SD: jax.Array, order_S: jax.Array, inverse_S: jax.Array) -> jax.Array:
    """The inverse permutation: slots in token order."""
    return y_SD[inverse_S]


_collect.defvjp(
    lambda y_SD, order_S, inverse_S: (y_SD[inverse_S], order_S), lambda order_S, dy_SD: (dy_SD[order_S], None, None)
)


def _ragged(
    x_SD: jax.Array, counts_E: jax.Array, weights: tuple[jax.Array, ...], layer: jax.Array | None = None
) -> jax.Array:
    """Grouped feed-forward network by `jax.lax.ragged_dot`.

    Whether an expert that is not finite stays out of other experts' rows and gradients is up to XLA's kernel: where
    that is a masked dense product, as on a CPU, it does not.
    """
    gate, up, down = (w.astype(x_SD.dtype) if layer is None else w[layer].astype(x_SD.dtype) for w in weights)
    hidden_SF = _gated(jax.lax.ragged_dot(x_SD, gate, counts_E), jax.lax.ragged_dot(x_SD, up, counts_E))
    return jax.lax.ragged_dot(hidden_SF, down, counts_E)


def _tiled(
    x_SD: jax.Array, counts_E: jax.Array, weights: tuple[jax.Array, ...], layer: jax.Array | None = None
) -> jax.Array:
    """Grouped feed-forward network: a loop over the experts in use and, for each, over tiles of its rows.

    A tile that extends past its expert's last row computes rows of the next expert, which that expert overwrites: no
    row is padded. The derivative is written by hand and keeps the two projections of the slots, as a dense layer does:
    only the gradient of the weights grows with the number of experts.
    """
    if layer is None:
        return _tiled_vjp(x_SD, counts_E, weights)
    return _tiled_forward(x_SD, counts_E, weights, layer, keep=False)[0]


def _tile_rows(slots: int, E: int) -> int:
    """About half of an expert's average load, which wastes little of its last tile, between the limits above."""
    rows = MIN_TILE_ROWS
    while rows < MAX_TILE_ROWS and 4 * rows <= slots / E:
        rows *= 2
    return min(rows, slots)


def _experts_in_use(counts_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(experts with rows, in order, then the others [E]; number of experts with rows; first row of each expert [E])."""
    return jnp.argsort(counts_E == 0, stable=True), (counts_E > 0).sum(), jnp.cumsum(counts_E) - counts_E


def _rows(array: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return from_bits(jax.lax.dynamic_slice_in_dim(array, start, count))


def _put(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, as_bits(rows), start, 0)


def _tiled_forward(
    x_SD: jax.Array, counts_E: jax.Array, weights: tuple[jax.Array, ...], layer: jax.Array | None, keep: bool
) -> tuple[jax.Array, list[jax.Array]]:
    """(y [S, D], gate and up projections [S + M, F] or their bits if `keep`)."""
    S, D = x_SD.shape
    F = weights[0].shape[-1]
    M = _tile_rows(S, counts_E.size)
    used_E, used, first_E = _experts_in_use(counts_E)
    padded = as_bits(jnp.pad(x_SD, ((0, M), (0, 0))))

    def one_expert(i, outputs):
        e = used_E[i]
        own = (w[e] if layer is None else w[layer, e] for w in weights)
        gate, up, down = (from_bits(w).astype(x_SD.dtype) for w in own)

        def one_tile(t, outputs):
            at = first_E[e] + t * M
            x_MD = _rows(padded, at, M)
            gate_MF, up_MF = (matmul(x_MD, w, x_SD.dtype) for w in (gate, up))
            tiles = (matmul(_gated(gate_MF, up_MF), down, x_SD.dtype), gate_MF, up_MF)
            return tuple(_put(out, tile, at) for out, tile in zip(outputs, tiles, strict=False))

        return jax.lax.fori_loop(0, -(-counts_E[e] // M), one_tile, outputs)

    outputs = tuple(as_bits(jnp.zeros((S + M, width), x_SD.dtype)) for width in ((D, F, F) if keep else (D,)))
    y, *kept = jax.lax.fori_loop(0, used, one_expert, outputs)
    return from_bits(y[:S]), kept


@jax.custom_vjp
def _tiled_vjp(x_SD: jax.Array, counts_E: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
    return _tiled_forward(x_SD, counts_E, weights, None, keep=False)[0]


def _tiled_vjp_fwd(x_SD: jax.Array, counts_E: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
    y_SD, kept = _tiled_forward(x_SD, counts_E, weights, None, keep=True)
    return y_SD, (as_bits(x_SD), counts_E, weights, kept)


def _tiled_vjp_bwd(residuals: tuple, dy_SD: jax.Array) -> tuple:
    bits, counts_E, weights, (gate_SF, up_SF) = residuals
    x_SD, S = from_bits(bits), len(bits)
    M, wide = _tile_rows(S, counts_E.size), sum_dtype(x_SD)
    used_E, used, first_E = _experts_in_use(counts_E)
    x_padded, dy_padded = (as_bits(jnp.pad(a, ((0, M), (0, 0)))) for a in (x_SD, dy_SD))

    def one_expert(i, carry):
        e = used_E[i]
        gate, up, down = (from_bits(w[e]).astype(x_SD.dtype) for w in weights)

        def one_tile(t, carry, first=False):
            dx, *dweights = carry
            at = first_E[e] + t * M
            own_M1 = (jnp.arange(M) < counts_E[e] - t * M)[:, None]
            x_MD, gate_MF, up_MF = (_rows(a, at, M) for a in (x_padded, gate_SF, up_SF))
            dy_MD = jnp.where(own_M1, _rows(dy_padded, at, M), 0)
            dhidden_MF = matmul_transposed(dy_MD, down, wide)
            # Rows of weight 0 and rows past the expert's last have dy = 0 and add 0, even if their projections or the
            # expert's weights are not finite.
            used_M1 = _used(dy_MD)
            hidden_MF, dgate_MF, dup_MF = _gated_bwd(gate_MF, up_MF, dhidden_MF, used_M1)
            dx_MD = matmul_transposed(dgate_MF, gate, wide) + matmul_transposed(dup_MF, up, wide)
            dx = _put(dx, jnp.where(used_M1, dx_MD, 0).astype(x_SD.dtype), at)
            rows = ((x_MD, dgate_MF), (x_MD, dup_MF), (hidden_MF, dy_MD))
            # In place: separate sums would be written and read once more.
            sums = [row_sums(*pair, d.dtype) for d, pair in zip(dweights, rows, strict=False)]
            return dx, *(d.at[e].set(part if first else d[e] + part) for d, part in zip(dweights, sums, strict=False))

        carry = one_tile(0, carry, first=True)  # writes what the others add to: an expert in use has a row
        return jax.lax.fori_loop(1, -(-counts_E[e] // M), one_tile, carry)

    initial = (jnp.zeros_like(x_padded), *(() if is_frozen(weights[0]) else map(jnp.zeros_like, weights)))
    dx, *dweights = jax.lax.fori_loop(0, used, one_expert, initial)
    return from_bits(dx[:S]), None, tuple(dweights) or (None, None, None)


_tiled_vjp.defvjp(_tiled_vjp_fwd, _tiled_vjp_bwd)

# The grouped kernel of each platform. On a CPU `ragged_dot` is a masked dense product: it costs more with more experts.
GROUPED = {"cpu": _tiled, "tpu": _ragged, "gpu": _ragged}
