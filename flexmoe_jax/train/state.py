"""What trains and what is frozen, as data: ordered rules, the mask and partition that follow, the state."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from flexmoe_jax.tree import PUBLIC, Params, flatten, match_rules, partition


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `step` counts batches seen; `bad_steps` skipped updates in a row, `skipped` in all."""

    step: jax.Array
    trainable: Params
    opt_state: Any
    bad_steps: jax.Array
    skipped: jax.Array


def freezing_rules(owner: str) -> list[tuple[str, bool]]:
    """Ordered (path pattern, trainable?) rules of a stage; the first match wins and every leaf must be covered.

    Public stage: all but the public router row (it stays the public domain embedding: one expert has nothing to route)
    and the public bias (0 by definition). Expert stage: the owner's expert and nothing else (paper section 3.2).
    """
    if owner == PUBLIC:
        return [("experts/public/(router|bias)", False), ("(trunk|experts/public)/.*", True)]
    return [(f"experts/{owner}/.*", True), ("trunk/.*", False), ("experts/public/.*", False)]


def freezing_mask(params: Params, owner: str) -> dict[str, bool]:
    """{path: trainable?} for every leaf of `params`."""
    return match_rules(flatten(params), freezing_rules(owner))


def freezing_table(params: Params, owner: str) -> list[tuple[str, bool, int, int]]:
    """The rules as applied: (pattern, trainable?, leaves, parameters) per rule, in order."""
    rows = []
    flat = flatten(params)
    ruled = match_rules(flat, [(pattern, i) for i, (pattern, _) in enumerate(freezing_rules(owner))])
    for i, (pattern, trainable) in enumerate(freezing_rules(owner)):
        leaves = [flat[path] for path, rule in ruled.items() if rule == i]
        rows.append((pattern, trainable, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)))
    return rows


def create_state(params: Params, owner: str, optimizer: optax.GradientTransformation, frozen_dtype=jnp.float32):
    """(TrainState, frozen leaves): trainable leaves are float32 and have moments, frozen ones are `frozen_dtype`."""
    trainable, frozen = partition(params, freezing_mask(params, owner))
    # Copied: the state is donated, and an expert begins as the public one: the same buffers as frozen leaves.
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
    frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, frozen_dtype), frozen)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, trainable, optimizer.init(trainable), zero + 0, zero + 0), frozen
