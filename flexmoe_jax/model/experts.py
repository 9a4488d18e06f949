"""Expert feed-forward networks and the two ways to run them: `dense` (the definition) and `sparse` (top-k only).

Both take `(x_ND, routing, experts)` and return sum_i weights_i(x) * FFN_i(x), shape [N, D]. `experts` are one layer's
weights: named {name: {w_gate [D, F], w_up [D, F], w_down [F, D]}} or stacked {w_gate [E, D, F], ...}.
"""

import functools

import jax
import jax.numpy as jnp

from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.model.router import Routing
from flexmoe_jax.tree import canonical_order, is_stacked

TILE_ROWS = 128
_WEIGHTS = ("w_gate", "w_up", "w_down")


def ffn(x_ND, w_gate, w_up, w_down):
    """W_down(silu(W_gate x) * (W_up x)) for x [N, D]; weights are cast to x's dtype."""
    gate_NF = x_ND @ w_gate.astype(x_ND.dtype)
    up_NF = x_ND @ w_up.astype(x_ND.dtype)
    return (jax.nn.silu(gate_NF) * up_NF) @ w_down.astype(x_ND.dtype)


def dense(x_ND, routing: Routing, experts):
    """Every expert runs on every token. An expert of weight zero cannot reach the output, whatever its values."""
    weights_EN = routing.weights_NE.T.astype(x_ND.dtype)

    def add(total_ND, weight_and_expert):
        weight_N, expert = weight_and_expert
        y_ND = ffn(x_ND, *(expert[name] for name in _WEIGHTS))
        return total_ND + weight_N[:, None] * jnp.where(weight_N[:, None] > 0, y_ND, 0), None

    total_ND = jnp.zeros_like(x_ND)
    if is_stacked(experts):
        return jax.lax.scan(add, total_ND, (weights_EN, {name: experts[name] for name in _WEIGHTS}))[0]
    for i, name in enumerate(canonical_order(experts)):
        total_ND, _ = add(total_ND, (weights_EN[i], experts[name]))
    return total_ND


def sparse(x_ND, routing: Routing, experts):
    """Only the chosen experts run, none drops a token. Needs the stacked form: no forward pass re-stacks.

    Tokens are sorted by expert and padded to tiles of `TILE_ROWS` rows, each tile of one expert; a loop runs over the
    tiles in use. The derivative is written by hand: it recomputes each tile, so no residual grows with the experts.
    """
    if not is_stacked(experts):
        raise FlexMoEError("sparse dispatch was given named experts", "stack them once, outside the forward pass")
    weights_Nk = jnp.take_along_axis(routing.weights_NE, routing.index_Nk, axis=-1).astype(x_ND.dtype)
    weights = tuple(experts[name].astype(x_ND.dtype) for name in _WEIGHTS)
    return _sparse(x_ND, weights_Nk, routing.index_Nk, weights)


def _tiles(index_Nk, E: int):
    """Sorts the slots (token, choice) by expert into tiles of one expert each.

    Returns (number of tiles in use, expert of each tile [tiles], slot of each row [tiles, M]); a row that only pads has
    slot N*k, one past the last. Static bound: every expert can leave one tile partly empty.
    """
    slots = index_Nk.size
    M = min(TILE_ROWS, slots)
    most = slots // M + E
    expert_S = index_Nk.reshape(-1)
    order_S = jnp.argsort(expert_S, stable=True)
    counts_E = jnp.bincount(expert_S, length=E)
    tiles_E = -(-counts_E // M)
    first_slot_E = jnp.cumsum(counts_E) - counts_E
    last_tile_E = jnp.cumsum(tiles_E)
    tile = jnp.arange(most)
    expert_of_tile = jnp.minimum(jnp.searchsorted(last_tile_E, tile, side="right"), E - 1)
    tile_in_expert = tile - (last_tile_E - tiles_E)[expert_of_tile]
    row = tile_in_expert[:, None] * M + jnp.arange(M)
    used = (row < counts_E[expert_of_tile][:, None]) & (tile < last_tile_E[-1])[:, None]
    slot = order_S[jnp.where(used, first_slot_E[expert_of_tile][:, None] + row, 0)]
    return last_tile_E[-1], expert_of_tile, jnp.where(used, slot, slots)


def _tile_inputs(t, tiles, x_ND, weights_Nk, weights):
    """One tile: its expert, its tokens [M] (N where padding), x [M, D], weights [M], and its expert's matrices."""
    _, expert_of_tile, slot_TM = tiles
    e, slot_M, k = expert_of_tile[t], slot_TM[t], weights_Nk.shape[1]
    token_M = slot_M // k
    x_MD = x_ND.at[token_M].get(mode="fill", fill_value=0)
    weight_M = weights_Nk.reshape(-1).at[slot_M].get(mode="fill", fill_value=0)
    return e, slot_M, token_M, x_MD, weight_M, tuple(w[e] for w in weights)


@jax.custom_vjp
def _sparse(x_ND, weights_Nk, index_Nk, weights):
    tiles = _tiles(index_Nk, weights[0].shape[0])

    def body(t, y_ND):
        _, _, token_M, x_MD, weight_M, expert = _tile_inputs(t, tiles, x_ND, weights_Nk, weights)
        y_MD = jnp.where(weight_M[:, None] > 0, ffn(x_MD, *expert), 0)
        return y_ND.at[token_M].add(weight_M[:, None] * y_MD, mode="drop")

    return jax.lax.fori_loop(0, tiles[0], body, jnp.zeros_like(x_ND))


def _sparse_fwd(x_ND, weights_Nk, index_Nk, weights):
    return _sparse(x_ND, weights_Nk, index_Nk, weights), (x_ND, weights_Nk, index_Nk, weights)


def _sparse_bwd(residuals, dy_ND):
    x_ND, weights_Nk, index_Nk, weights = residuals
    tiles = _tiles(index_Nk, weights[0].shape[0])

    def body(t, carry):
        dx_ND, dweights_S, dexperts = carry
        e, slot_M, token_M, x_MD, weight_M, expert = _tile_inputs(t, tiles, x_ND, weights_Nk, weights)
        dy_MD = dy_ND.at[token_M].get(mode="fill", fill_value=0)
        y_MD, pull = jax.vjp(ffn, x_MD, *expert)
        dx_MD, *dexpert = pull(weight_M[:, None] * dy_MD)
        dx_ND = dx_ND.at[token_M].add(dx_MD, mode="drop")
        dweights_S = dweights_S.at[slot_M].set(jnp.where(weight_M > 0, (y_MD * dy_MD).sum(-1), 0), mode="drop")
        return dx_ND, dweights_S, tuple(d.at[e].add(g) for d, g in zip(dexperts, dexpert, strict=True))

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    carry = (zeros(x_ND), jnp.zeros(weights_Nk.size, weights_Nk.dtype), zeros(weights))
    dx_ND, dweights_S, dexperts = jax.lax.fori_loop(0, tiles[0], body, carry)
    return dx_ND, dweights_S.reshape(weights_Nk.shape), None, dexperts


_sparse.defvjp(_sparse_fwd, _sparse_bwd)

DISPATCH = {"dense": dense, "sparse": sparse}
