"""The stacked form of experts: feed-forward weights in one array per leaf, router rows and biases by name.

    {"public": {w_gate, .., router, bias}, "news": {..}}  <->  {"stacked": {w_gate [L, E, D, F], ..},
                                                                "public": {router, bias}, "news": {router, bias}}

Experts are in canonical order. The stacked form exists only in memory and in checkpoints of runs whose mesh splits
experts; packages and models have named experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexmoe_jax.tree import Params, canonical_order

STACKED = "stacked"
ROWS = ("router", "bias")


class StackedLeaf:
    """Leaves [L, ...] of several experts as one leaf [L, E, ...] that reads only the slices that are asked for."""

    def __init__(self, leaves: Sequence[Any]):
        self.leaves = leaves
        L, *rest = leaves[0].shape
        self.shape, self.dtype = (L, len(leaves), *rest), jnp.result_type(*(leaf.dtype for leaf in leaves))

    def __getitem__(self, index: tuple) -> np.ndarray:
        layers, experts, *rest = index
        return np.stack([np.asarray(leaf[(layers, *rest)]) for leaf in self.leaves[experts]], axis=1)


def stack_weights(experts: Mapping[str, Params]) -> Params:
    """Named experts (or one side of a partition of their leaves) -> the stacked form.

    Except for router rows and biases, all experts must have a leaf, or none.
    """
    order = canonical_order(experts)
    names = sorted({leaf for name in order for leaf in experts[name]} - {*ROWS})
    stacked = {leaf: StackedLeaf([experts[name][leaf] for name in order]) for leaf in names}
    rows = {name: {leaf: experts[name][leaf] for leaf in ROWS if leaf in experts[name]} for name in order}
    return ({STACKED: stacked} if stacked else {}) | {name: leaves for name, leaves in rows.items() if leaves}


def unstack_weights(experts: Mapping[str, Params], names: Iterable[str]) -> dict[str, Params]:
    """The inverse of `stack_weights`; `names` are the names of all experts."""
    named: dict[str, Params] = {name: dict(experts.get(name, {})) for name in canonical_order(names)}
    for leaf, value in experts.get(STACKED, {}).items():
        for i, name in enumerate(named):
            named[name][leaf] = value[:, i]
    return {name: leaves for name, leaves in named.items() if leaves}


def with_stacked_rows(experts: Mapping[str, Params]) -> Params:
    """The stacked form -> every leaf stacked [L, E, ...], as dispatch needs it: copies E * D numbers per layer."""
    order = canonical_order(name for name in experts if name != STACKED)
    return {**experts[STACKED], **{leaf: jnp.stack([experts[n][leaf] for n in order], axis=1) for leaf in ROWS}}
