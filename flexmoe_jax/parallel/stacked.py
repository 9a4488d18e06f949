"""The stacked form of experts: feed-forward weights in one array per leaf, router rows and biases by name.

    {"public": {w_gate, .., router, bias}, "news": {..}}  <->  {"stacked": {w_gate [L, E, D, F], ..},
                                                                "public": {router, bias}, "news": {router, bias}}

Experts are in canonical order. A mesh that splits E experts over `groups` devices gets equal numbers of slots for them:
where E is not a multiple of `groups`, empty slots follow the experts. They hold zeros, no token can choose them, and
so their gradients and moments are zero, too. The stacked form exists only in memory; packages, models and checkpoints
have named experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.params import HEAD_LEAVES
from flexmoe_jax.tree import Params, canonical_order

STACKED = "stacked"
ROWS = ("router", "bias")
BY_NAME = (*ROWS, *HEAD_LEAVES)  # what is never stacked


class StackedLeaf:
    """Leaves [L, ...] of E experts as one leaf [L, slots, ...] that reads only the slices that are asked for."""

    def __init__(self, leaves: Sequence[Any], slots: int):
        self.leaves = leaves
        L, *rest = leaves[0].shape
        self.shape, self.dtype = (L, slots, *rest), jnp.result_type(*(leaf.dtype for leaf in leaves))

    def __getitem__(self, index: tuple) -> np.ndarray:
        layers, experts, *rest = index
        parts = [np.asarray(leaf[(layers, *rest)]) for leaf in self.leaves[experts]]
        empty = len(range(*experts.indices(self.shape[1]))) - len(parts)
        parts += [np.zeros_like(self.leaves[0][(layers, *rest)]) for _ in range(empty)]
        return np.stack(parts, axis=1)


def stack_weights(experts: Mapping[str, Params], groups: int = 1) -> Params:
    """Named experts (or one side of a partition of their leaves) -> the stacked form, for `groups` devices.

    Except for router rows, biases and changes of the output head, all experts must have a leaf, or none.
    """
    order = canonical_order(experts)
    names, slots = sorted({leaf for name in order for leaf in experts[name]} - {*BY_NAME}), -(-len(order) // groups)
    stacked = {leaf: StackedLeaf([experts[name][leaf] for name in order], slots * groups) for leaf in names}
    rows = {name: {leaf: experts[name][leaf] for leaf in BY_NAME if leaf in experts[name]} for name in order}
    return ({STACKED: stacked} if stacked else {}) | {name: leaves for name, leaves in rows.items() if leaves}


def unstack_weights(experts: Mapping[str, Params], names: Iterable[str]) -> dict[str, Params]:
    """The inverse of `stack_weights`, also of an optimizer's moments; `names` are the names of all experts.

    Moments of one axis do not belong to experts (optax's place-holders of factored moments): each name gets them.
    """
    named: dict[str, Params] = {name: dict(experts.get(name, {})) for name in canonical_order(names)}
    for i, leaves in enumerate(named.values()):
        leaves |= jax.tree.map(lambda leaf, i=i: leaf[:, i] if leaf.ndim > 1 else leaf, experts.get(STACKED, {}))
    return {name: leaves for name, leaves in named.items() if leaves}


def restack_weights(named: Mapping[str, Params], like: Mapping[str, Params]) -> Params:
    """The inverse of `unstack_weights`: named experts' arrays in the stacked form of `like` (arrays or shapes)."""

    def stack(shape: Any, *leaves: jax.Array) -> jax.Array:
        if len(shape.shape) == 1:
            return leaves[0]
        empty = shape.shape[1] - len(leaves)
        return jnp.stack([*leaves, *[jnp.zeros_like(leaves[0])] * empty], axis=1)

    parts = [{leaf: named[name][leaf] for leaf in like[STACKED]} for name in canonical_order(named)]
    rows = {name: {leaf: named[name][leaf] for leaf in like[name]} for name in like if name != STACKED}
    return {STACKED: jax.tree.map(stack, like[STACKED], *parts), **rows}


def with_stacked_rows(experts: Mapping[str, Params]) -> Params:
    """The stacked form -> every leaf stacked, as dispatch needs it: copies E * D numbers per layer.

    Router rows and biases are those of the experts, [L, E, ...]; weights may have empty slots behind them.
    """
    order = canonical_order(name for name in experts if name != STACKED)
    return {**experts[STACKED], **{leaf: jnp.stack([experts[n][leaf] for n in order], axis=1) for leaf in ROWS}}
