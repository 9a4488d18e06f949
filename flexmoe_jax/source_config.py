"""Several sources of training text in one value of a configuration, each with its weight."""

import dataclasses
import fractions
import math
import os
import pathlib
import re

from flexmoe_jax.errors import ConfigError

MOST_ROWS = 100_000  # the smallest whole-number weights of a mixture add up to at most this
_WEIGHTED = re.compile(r"\s*([-+]?\d[\d.e+-]*)\s+(\S.*?)\s*")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of training text, of the configuration's `key`: its path, and its whole-number weight in the key."""

    key: str
    path: str
    weight: int = 1


def read_mixture(where: str, text: str) -> dict[str, tuple[str, int]]:
    """`3 letters; 1 minutes` -> {folder's name: (path, whole-number weight)}; any other text is one path of weight 1.

    `where` names the key. A name that comes twice gets a number. The order is that of the names, however the text has
    them: batches depend on it, and run.json does not record it. ConfigError for a weight that is not a number above 0,
    a path given twice, and weights that no `MOST_ROWS` rows are in proportion to.
    """
    parts = [_WEIGHTED.fullmatch(part) for part in text.split(";") if part.strip()]
    if len(parts) < 2 or parts[0] is None:
        return {_name(text): (text, 1)}
    weights: dict[str, fractions.Fraction] = {}
    for part, given in zip(parts, filter(str.strip, text.split(";")), strict=True):
        if part is None:
            raise ConfigError(f"{where} holds {given.strip()!r}", "write WEIGHT PATH; WEIGHT PATH; ...")
        weight, path = part.groups()
        try:
            share = fractions.Fraction(weight)
        except ValueError:
            share = fractions.Fraction(0)
        if share <= 0:
            raise ConfigError(f"{where} gives {path} the weight {weight}", "give a number above 0, or leave it out")
        if os.path.realpath(path) in map(os.path.realpath, weights):
            raise ConfigError(f"{where} names {path} twice", "give every source once, with all of its weight")
        weights[path] = share
    unit = math.lcm(*(share.denominator for share in weights.values()))
    counts = [int(share * unit) for share in weights.values()]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > MOST_ROWS:
        what = f"the weights of {where} are in proportion at {sum(counts):,} rows only"
        raise ConfigError(what, f"round them, so that it is at most {MOST_ROWS:,}: three digits are enough")
    found: dict[str, tuple[str, int]] = {}
    for path, count in zip(weights, counts, strict=True):
        name, number = _name(path), 1
        while name in found:
            number += 1
            name = f"{_name(path)}-{number}"
        found[name] = path, count
    return dict(sorted(found.items()))


def _name(path: str) -> str:
    return pathlib.Path(os.path.abspath(path)).name
