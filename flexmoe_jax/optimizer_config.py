"""The configuration of the optimizer."""

import dataclasses

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.ranges import CountOrZero, NotNegative, Positive, Share, ShareBelowOne, check_numbers


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper section 4 and its published training scripts).

    AdamW keeps 8 bytes per trained parameter; `first_moment` and `second_moment` can lower that. ConfigError for an
    unknown choice.
    """

    lr: NotNegative = 9e-4
    """Peak learning rate. The paper's for a 7B expert; the quickstart's small models use 1.5e-3 to 3e-3."""

    warmup_steps: CountOrZero = 2000
    """Steps of linear warm-up from 0 to `lr`; at most `steps - 1` are used. The paper's."""

    end_lr_fraction: Share = 0.1
    """Learning rate at the last step, as a fraction of `lr`. OLMo-2's schedule."""

    b1: ShareBelowOne = 0.9
    """Decay of the first moment. The paper's; 0 keeps no first moment where the second is factored."""

    b2: ShareBelowOne = 0.95
    """Decay of the second moment. The paper's. Not used where the second moment is factored."""

    eps: Positive = 1e-8
    """Added to the root of the second moment. Not used where the second moment is factored."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay per unit of learning rate, of trained parameters only. The paper's is 0."""

    clip_norm: Positive = 1.0
    """Largest global norm of a step's gradient; larger ones are scaled down. The paper's."""

    first_moment: str = "float32"
    """Dtype in which the first moment is kept: float32, or bfloat16 for 6 bytes per parameter instead of 8."""

    second_moment: str = "full"
    """`full`, or `factored`: the means of a matrix's rows and of its columns instead of all its entries, with
    Adafactor's decay and bound on an update (arXiv 1804.04235): 4 bytes per parameter, next to none with `b1=0`."""

    def __post_init__(self):
        check_numbers(self, "config.optimizer")
        for name, known in (("first_moment", ("float32", "bfloat16")), ("second_moment", ("full", "factored"))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"config.optimizer.{name} is {getattr(self, name)!r}", f"use one of: {', '.join(known)}"
                )
