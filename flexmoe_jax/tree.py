"""The owner algebra: a FlexMoE parameter tree is the disjoint union `trunk + public + owner_1 + ... + owner_n`.

    params = {"trunk": {...}, "experts": {"public": {...}, "news": {...}}}

Every leaf belongs to exactly one owner. Owners are names, never positions; their only order, the canonical one, is
`public` first, then alphabetical. These functions move references: they copy and change no leaf.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NewType

from flexmoe_jax.errors import ArtifactError, FlexMoEError, did_you_mean

TRUNK, PUBLIC = "trunk", "public"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_RESERVED = {TRUNK, PUBLIC, "experts", "model", "all", "none", "uniform", "router", "journal", "tokenizer", "stacked"}

Params = dict[str, Any]
ExpertName = NewType("ExpertName", str)  # checked by `expert_name`: it may name a directory


def expert_name(value: object) -> ExpertName:
    """`value` from a file as the name of an expert: `public` or a data owner's; FlexMoEError for anything else."""
    if not isinstance(value, str):
        raise FlexMoEError(f"the expert name {value!r} is not text", "restore the file from its source")
    return ExpertName(value if value == PUBLIC else check_owner_name(value))


def check_owner_name(name: str) -> str:
    """Returns `name` if a data owner may use it; FlexMoEError if it is reserved or malformed.

    A name has 1 to 63 lower-case letters, digits, `-` and `_`, and starts with a letter: it may name a directory.
    """
    if name in _RESERVED:
        raise FlexMoEError(
            f"the expert name {name!r} is reserved", f"choose a name not in: {', '.join(sorted(_RESERVED))}"
        )
    if not _NAME.fullmatch(name):
        raise FlexMoEError(
            f"the expert name {name!r} is not usable",
            "use lower-case letters, digits, '-' and '_', starting with a letter, 63 characters at most",
        )
    return name


def canonical_order(names: Iterable[str]) -> tuple[str, ...]:
    """`names`, `public` first, then alphabetical: the only order of experts. FlexMoEError for a name given twice."""
    names = list(names)
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise FlexMoEError(f"the expert name {doubled[0]!r} is given twice", "give every expert a name of its own")
    return tuple(sorted(names, key=lambda n: (n != PUBLIC, n)))


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"trunk/blocks/w_q": leaf}, keys sorted at every level."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, path = tree[key], f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def split(params: Params) -> dict[str, Params]:
    """Whole tree -> {"trunk": subtree, "public": subtree, "news": subtree}, experts in canonical order.

    `union` is the inverse.
    """
    experts = params["experts"]
    return {TRUNK: params["trunk"], **{name: experts[name] for name in canonical_order(experts)}}


def union(*parts: Mapping[str, Params]) -> Params:
    """{owner: subtree} mappings -> whole tree, experts in canonical order.

    FlexMoEError if two parts hold the same owner, or there is not exactly one trunk.
    """
    names = [name for part in parts for name in part]
    order = canonical_order(n for n in names if n != TRUNK)
    if names.count(TRUNK) != 1:
        raise FlexMoEError(f"{names.count(TRUNK)} trunks were given, a model has one", "give exactly one trunk")
    owned = {name: subtree for part in parts for name, subtree in part.items()}
    return {"trunk": owned[TRUNK], "experts": {name: owned[name] for name in order}}


def select(params: Params, names: Iterable[str]) -> Params:
    """The model that never had the other experts: keeps only `names`, in canonical order.

    FlexMoEError for an unknown name, a name given twice, or no name.
    """
    experts = params["experts"]
    return {**params, "experts": {name: experts[name] for name in check_known(names, experts)}}


def without(params: Params, *names: str) -> Params:
    """The model that never had `names`.

    FlexMoEError for an unknown name, a name given twice, no name, or if no expert is left.
    """
    experts = params["experts"]
    check_known(names, experts)
    return select(params, [n for n in experts if n not in names])


def check_known(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """`names` in canonical order; FlexMoEError for one that is not in `known` or given twice, or if there is none."""
    known, order = list(known), canonical_order(names)
    for name in order:
        if name not in known:
            raise FlexMoEError(f"there is no expert {name!r} in this model", did_you_mean(name, known))
    if not order:
        raise FlexMoEError("no expert is left", f"keep at least one of: {', '.join(canonical_order(known))}")
    return order


def match_rules(paths: Iterable[str], rules: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """{path: value of the first (pattern, value) rule whose pattern matches the whole path}.

    FlexMoEError for a path that no rule covers.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    matched = {}
    for path in paths:
        values = [value for pattern, value in compiled if pattern.fullmatch(path)]
        if not values:
            raise FlexMoEError(f"no rule covers the parameter {path!r}", "add a rule: rules must cover every leaf")
        matched[path] = values[0]
    return matched


def partition(params: Params, mask: Mapping[str, bool]) -> tuple[Params, Params]:
    """(leaves whose `mask`, a {path: bool}, is True; the others), both as nested trees; `combine` is the inverse."""
    flat = flatten(params)
    return tuple(unflatten({p: leaf for p, leaf in flat.items() if mask[p] is want}) for want in (True, False))  # type: ignore[return-value]


def combine(*parts: Params) -> Params:
    """Joins disjoint trees into one; ArtifactError for a path that is in two of them."""
    flat: dict[str, Any] = {}
    for part in parts:
        for path, leaf in flatten(part).items():
            if path in flat:
                raise ArtifactError(f"two parts hold the parameter {path!r}", "give disjoint parts of one tree")
            flat[path] = leaf
    return unflatten(flat)
