"""The numbers that the keys of configurations and the options of the command line accept: each range is declared once.

steps: Count                             a key; `check_numbers` in the class's __post_init__ refuses others
top_k: Annotated[int | None, COUNT]      a key that may be None
add_argument("--steps", type=COUNT)      an option
"""

import argparse
import contextlib
import dataclasses
import typing
from typing import Annotated, Any

from flexmoe_jax.errors import ConfigError

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = 3.4e38


@dataclasses.dataclass(frozen=True)
class Range:
    """The whole numbers, or all, from `least` to `most`; without these two where `open_below` and `open_above`.

    As a function it is a type of argparse: the number of a text.
    """

    kind: type[int] | type[float]
    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: Any) -> bool:
        if (
            isinstance(value, bool)
            or not self.least <= value <= self.most
            or (self.kind is int and value != int(value))
        ):
            return False
        return not (self.open_below and value == self.least) and not (self.open_above and value == self.most)

    def __str__(self) -> str:
        kind = "a whole number" if self.kind is int else "a number"
        least, most = (format(self.kind(bound), "d" if self.kind is int else "g") for bound in (self.least, self.most))
        if not (self.open_below or self.open_above):
            return f"{kind} from {least} to {most}"
        lower, upper = "above" if self.open_below else "of at least", "below" if self.open_above else "at most"
        return f"{kind} {lower} {least} and {upper} {most}"

    def __call__(self, text: str) -> Any:
        with contextlib.suppress(ValueError):
            if (value := self.kind(text)) in self:
                return value
        raise argparse.ArgumentTypeError(f"it is {text!r}: give {self}")


COUNT = Range(int, 1, MAX_INT32)
COUNT_OR_ZERO = Range(int, 0, MAX_INT32)
SEED = Range(int, 0, 2**32 - 1)  # JAX drops further bits: other seeds would not be other seeds
POSITIVE = Range(float, 0, MAX_FLOAT32, open_below=True)
NOT_NEGATIVE = Range(float, 0, MAX_FLOAT32)
NOT_POSITIVE = Range(float, -MAX_FLOAT32, 0)
SHARE = Range(float, 0, 1)
SHARE_BELOW_ONE = Range(float, 0, 1, open_above=True)
SHARE_ABOVE_ZERO = Range(float, 0, 1, open_below=True)

Count = Annotated[int, COUNT]
CountOrZero = Annotated[int, COUNT_OR_ZERO]
Seed = Annotated[int, SEED]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]
ShareBelowOne = Annotated[float, SHARE_BELOW_ONE]


def ranges_of(cls: type) -> dict[str, Range]:
    """{field: the range that it declares} of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    declared = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: limit for name, extras in declared.items() for limit in extras if isinstance(limit, Range)}


def check_numbers(config: object, where: str) -> None:
    """ConfigError if a number of the dataclass `config` is outside its field's range; `where` is its name."""
    for name, allowed in ranges_of(type(config)).items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{where}.{name} is {value!r}", f"give {allowed}")
