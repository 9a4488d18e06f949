"""Sparse dispatch over a mesh: experts are split over the `expert` axis, tokens move to them, and none is dropped.

In one `shard_map` over all axes, the devices of an expert group exchange their tokens (all-gather), each runs the
slots of its own experts, and the sums return to the devices of the tokens (reduce-scatter). Weights split by `fsdp`
are gathered for the layer; with `tensor` each device computes its part of the feed-forward width. The derivative
mirrors this: gradients of weights are reduced and split like the weights.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model.experts import run_slots
from flexmoe_jax.model.router import Routing
from flexmoe_jax.parallel.mesh import BATCH, current_mesh
from flexmoe_jax.params import EXPERT, FFN_WEIGHTS, FSDP, STACKED_AXES, TENSOR
from flexmoe_jax.tree import Params

_ROWS = P(BATCH, None)
_WEIGHTS = {name: P(*axes[1:]) for name, axes in STACKED_AXES.items()}  # one layer's [E, D, F] and [E, F, D]


def sparse_on_mesh(x_ND: jax.Array, routing: Routing, experts: Params, layer: object = None) -> jax.Array:
    """`sparse` of one layer's stacked experts on the current mesh: x [N, D] -> [N, D], rows split like a batch.

    Empty slots of the stack follow the experts: no index of a token reaches them. ConfigError if the mesh cannot split
    the tokens evenly.
    """
    mesh = current_mesh()
    assert mesh is not None
    groups = mesh.shape[EXPERT]
    N, parts = x_ND.shape[0], mesh.shape["data"] * mesh.shape[FSDP] * groups
    if N % parts:
        raise ConfigError(f"{N} tokens cannot be split over {parts} devices", f"choose a multiple of {parts} tokens")
    weights_Nk = jnp.take_along_axis(routing.weights_NE, routing.index_Nk, axis=-1)

    def local(x_nD, index_nk, weights_nk, gate, up, down):
        x_ND, index_Nk, weights_Nk = (_gather(a, EXPERT) for a in (x_nD, index_nk, weights_nk))
        gate, up = (_gather(w, FSDP, 1) for w in (gate, up))
        down = _gather(down, FSDP, 2)
        mine_Nk = index_Nk - jax.lax.axis_index(EXPERT) * gate.shape[0]
        here_Nk = (mine_Nk >= 0) & (mine_Nk < gate.shape[0])
        y_ND = run_slots(
            x_ND, jnp.where(here_Nk, mine_Nk, gate.shape[0]), jnp.where(here_Nk, weights_Nk, 0), (gate, up, down)
        )
        y_ND = jax.lax.psum(y_ND, TENSOR) if mesh.shape[TENSOR] > 1 else y_ND
        return jax.lax.psum_scatter(y_ND, EXPERT, tiled=True) if groups > 1 else y_ND

    def _gather(a, axis: str, dimension: int = 0):
        return a if mesh.shape[axis] == 1 else jax.lax.all_gather(a, axis, axis=dimension, tiled=True)

    rows = (_ROWS, _ROWS, _ROWS)
    run = jax.shard_map(
        local, in_specs=(*rows, *(_WEIGHTS[name] for name in FFN_WEIGHTS)), out_specs=_ROWS, check_vma=False
    )
    return run(x_ND, routing.index_Nk, weights_Nk, *(experts[name] for name in FFN_WEIGHTS))
