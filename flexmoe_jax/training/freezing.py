"""What is trained and what is frozen: ordered rules, of which the first that matches wins (paper section 3.2)."""

import math

from flexmoe_jax.tree import PUBLIC, Params, flatten, match_rules


def freezing_rules(params: Params, owner: str, freeze: str | None = None) -> list[tuple[str, bool]]:
    """Ordered (path pattern, trainable?) rules of a run; the first match wins, and the rules cover every leaf.

    A public run trains everything except the public bias, which is 0 by definition. An owner's run trains only the
    owner's expert (FlexOlmo, arXiv 2507.07024, section 3.2). The router row of a single expert is frozen: there is
    nothing to route, so it stays the domain embedding. `freeze` is a pattern of further paths to freeze.
    """
    rules = [(freeze, False)] if freeze else []
    if len(params["experts"]) == 1:
        rules.append(("experts/.*/(router|bias)", False))
    if owner == PUBLIC:
        return [*rules, ("experts/public/bias", False), ("(trunk|experts)/.*", True)]
    return [*rules, (f"experts/{owner}/.*", True), ("trunk/.*", False), ("experts/public/.*", False)]


def freezing_mask(params: Params, owner: str, freeze: str | None = None) -> dict[str, bool]:
    """{path: trainable?} of every leaf of `params`."""
    return match_rules(flatten(params), freezing_rules(params, owner, freeze))


def freezing_table(params: Params, owner: str, freeze: str | None = None) -> list[tuple[str, bool, int, int]]:
    """(pattern, trainable?, number of leaves, number of parameters) of each rule that decides a leaf, in order."""
    rows = []
    flat, rules = flatten(params), freezing_rules(params, owner, freeze)
    ruled = match_rules(flat, [(pattern, i) for i, (pattern, _) in enumerate(rules)])
    for i, (pattern, trainable) in enumerate(rules):
        leaves = [flat[path] for path, rule in ruled.items() if rule == i]
        if leaves:
            rows.append((pattern, trainable, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)))
    return rows
