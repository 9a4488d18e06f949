"""The configuration of the optimizer."""

import dataclasses
import re
from typing import Annotated, ClassVar

from flexmoe_jax.errors import ConfigError, did_you_mean
from flexmoe_jax.ranges import (
    COUNT,
    NOT_NEGATIVE,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    check_numbers,
)

SCHEDULES = ("cosine", "wsd", "constant", "restarts")
# Decays by default: matrices, and the head, which is one (OLMo-2 decays it too); not embeddings, norms, rows, biases.
DECAYED = "(.*/)?w_[^/]*|trunk/head"


@dataclasses.dataclass(frozen=True)
class Group:
    """Factors on the learning rate and on the weight decay of the parameters whose whole path matches `pattern`.

    `decay` None: 1 for the paths that `DECAYED` matches, 0 for others.
    """

    pattern: str
    lr: float = 1.0
    decay: float | None = None

    def of(self, path: str) -> "Group":
        """The group with both factors as they are for the parameter `path`."""
        default = 1.0 if re.fullmatch(DECAYED, path) else 0.0
        return dataclasses.replace(self, decay=default if self.decay is None else self.decay)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper section 4 and its published training scripts).

    AdamW keeps 8 bytes per trained parameter; `first_moment` and `second_moment` can lower that. ConfigError for an
    unknown choice, and for groups that cannot be read.
    """

    LATER: ClassVar = ("schedule", "schedule_steps", "decay_share", "cycles", "groups")

    lr: NotNegative = 9e-4
    """Peak learning rate. The paper's for a 7B expert; the quickstart's small models use 1.5e-3 to 3e-3."""

    warmup_steps: CountOrZero = 2000
    """Steps of linear warm-up from 0 to `lr`; at most `steps - 1` are used. The paper's."""

    end_lr_fraction: Share = 0.1
    """Learning rate at the end of the schedule, as a fraction of `lr`. OLMo-2's."""

    schedule: str = "cosine"
    """Course of the rate after the warm-up: `cosine` to the end; `wsd`, stable at `lr` and then linear to the end in
    the last `decay_share` (MiniCPM, arXiv 2404.06395); `constant`; or `restarts`, `cycles` cosines, each of which
    starts at `lr` again (SGDR, arXiv 1608.03983)."""

    schedule_steps: Annotated[int | None, COUNT] = None
    """Steps that the schedule takes; after them the rate stays what it is at their end. None: the steps of the run at
    its start, so that more `steps` for a resumed run do not bend the curve that it has followed."""

    decay_share: Share = 0.2
    """Share of `schedule_steps` at their end in which the rate of `wsd` decays."""

    cycles: Count = 3
    """Cosines of `restarts`, of equal length; the first begins with the warm-up."""

    b1: ShareBelowOne = 0.9
    """Decay of the first moment. The paper's; 0 keeps no first moment where the second is factored."""

    b2: ShareBelowOne = 0.95
    """Decay of the second moment. The paper's. Not used where the second moment is factored."""

    eps: Positive = 1e-8
    """Added to the root of the second moment. Not used where the second moment is factored."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay per unit of learning rate, of the matrices that are trained. The paper's is 0. Norms,
    embeddings, router rows and biases do not decay, unless `groups` says so."""

    groups: str | None = None
    """Parameters with a learning rate or weight decay of their own: `PATTERN lr=FACTOR decay=FACTOR; ...`, as
    `experts/.*/(router|bias) lr=3`. The first pattern (a regular expression) that matches a whole path decides; one
    that matches no trained parameter is refused. A factor that is not given is as without groups."""

    clip_norm: Positive = 1.0
    """Largest global norm of a step's gradient; larger ones are scaled down. The paper's."""

    first_moment: str = "float32"
    """Dtype in which the first moment is kept: float32, or bfloat16 for 6 bytes per parameter instead of 8."""

    second_moment: str = "full"
    """`full`, or `factored`: the means of a matrix's rows and of its columns instead of all its entries, with
    Adafactor's decay and bound on an update (arXiv 1804.04235): 4 bytes per parameter, next to none with `b1=0`."""

    def __post_init__(self):
        check_numbers(self, "config.optimizer")
        choices = {"first_moment": ("float32", "bfloat16"), "second_moment": ("full", "factored")}
        for name, known in (choices | {"schedule": SCHEDULES}).items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"config.optimizer.{name} is {getattr(self, name)!r}", f"use one of: {', '.join(known)}"
                )
        _ = self.rules  # refuses what cannot be read

    @property
    def rules(self) -> tuple[Group, ...]:
        """The groups in their order, and at the end one for all other parameters; they cover every path."""
        texts = (self.groups or "").split(";")
        return (*(_group(text) for text in texts if text.strip()), Group(".*"))


def _group(text: str) -> Group:
    """`PATTERN lr=3 decay=0` as a Group; ConfigError for anything else."""
    pattern, *settings = text.split()
    what, factors = f"config.optimizer.groups holds {text.strip()!r}", {}
    for setting in settings:
        name, _, number = setting.partition("=")
        if name not in ("lr", "decay"):
            raise ConfigError(f"{what}: unknown setting {name!r}", did_you_mean(name, ("lr", "decay")))
        try:
            factors[name] = float(number)
        except ValueError:
            factors[name] = -1.0
        if factors[name] not in NOT_NEGATIVE:
            raise ConfigError(f"{what}: {name} is {number!r}", f"give {NOT_NEGATIVE}")
    if not factors:
        raise ConfigError(f"{what}, which changes nothing", "write PATTERN lr=FACTOR, PATTERN decay=FACTOR, or both")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what}, which is not a pattern: {error}", "correct it") from error
    return Group(pattern, **factors)
