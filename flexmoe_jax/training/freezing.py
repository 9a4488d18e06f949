"""What trains and what is frozen, as data: ordered rules of which the first that matches wins (paper section 3.2)."""

import math

from flexmoe_jax.tree import PUBLIC, Params, flatten, match_rules


def freezing_rules(params: Params, owner: str, freeze: str | None = None) -> list[tuple[str, bool]]:
    """Ordered (path pattern, trainable?) rules of a stage; the first match wins and every leaf must be covered.

    Public stage: everything but the public bias (0 by definition). Expert stage: the owner's expert and nothing else
    (paper section 3.2). The router row of an expert that is alone stays its domain embedding: it has nothing to route.
    """
    rules = [(freeze, False)] if freeze else []
    if len(params["experts"]) == 1:
        rules.append(("experts/.*/(router|bias)", False))
    if owner == PUBLIC:
        return [*rules, ("experts/public/bias", False), ("(trunk|experts)/.*", True)]
    return [*rules, (f"experts/{owner}/.*", True), ("trunk/.*", False), ("experts/public/.*", False)]


def freezing_mask(params: Params, owner: str, freeze: str | None = None) -> dict[str, bool]:
    """{path: trainable?} for every leaf of `params`."""
    return match_rules(flatten(params), freezing_rules(params, owner, freeze))


def freezing_table(params: Params, owner: str, freeze: str | None = None) -> list[tuple[str, bool, int, int]]:
    """The rules as applied: (pattern, trainable?, leaves, parameters) per rule that decides a leaf, in order."""
    rows = []
    flat, rules = flatten(params), freezing_rules(params, owner, freeze)
    ruled = match_rules(flat, [(pattern, i) for i, (pattern, _) in enumerate(rules)])
    for i, (pattern, trainable) in enumerate(rules):
        leaves = [flat[path] for path, rule in ruled.items() if rule == i]
        if leaves:
            rows.append((pattern, trainable, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)))
    return rows
