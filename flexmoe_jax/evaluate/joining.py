"""What joining a merged model gives or costs an owner, on held-out text of its own."""

import dataclasses

import numpy as np
from scipy.special import stdtrit

from flexmoe_jax.evaluate.perplexity import Score


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference in bits per byte; its 95% interval is `value` plus or minus `half_width`.

    `half_width` is None for a single document, which says nothing about others.
    """

    value: float
    half_width: float | None

    @property
    def includes_zero(self) -> bool:
        """Whether the interval includes 0, or cannot be told: these documents do not tell the sign."""
        return self.half_width is None or not abs(self.value) > self.half_width


def difference(a: Score, b: Score) -> Difference:
    """The bits per byte of `a` minus those of `b`, which are scores of the same D documents.

    Documents are the clusters: the interval is the t interval, with D - 1 degrees of freedom, of a ratio of two sums
    over documents, linearized (Cochran, Sampling Techniques, 1977, chapter 6). It covers the choice of documents, not
    that of a training's seed.
    """
    value = a.bits_per_byte - b.bits_per_byte
    documents = len(a.bytes_D)
    if documents == 1:
        return Difference(value, None)
    bits_D = (a.nats_D - b.nats_D) / np.log(2)
    residuals_D = (bits_D - value * a.bytes_D) / a.bytes_D.mean()
    error = residuals_D.std(ddof=1) / np.sqrt(documents)
    return Difference(value, float(stdtrit(documents - 1, 0.975) * error))


@dataclasses.dataclass(frozen=True)
class Joining:
    """Scores of an owner's held-out text under three models of the same top-k (`Model.joining`).

    `public` is the public model alone, `hybrid` the model of {public, owner}, `merged` the model of all experts.
    """

    public: Score
    hybrid: Score
    merged: Score

    @property
    def gain(self) -> Difference:
        """Public alone minus merged: what the merged model gives the owner, above 0 where it is the better one."""
        return difference(self.public, self.merged)

    @property
    def regret(self) -> Difference:
        """Merged minus own hybrid: what the other owners cost this one, above 0 where the hybrid is the better one."""
        return difference(self.merged, self.hybrid)

    def describe(self) -> dict:
        """The numbers as JSON values, all in bits per byte but for the counts; they hold no text."""
        return {
            "documents": len(self.merged.bytes_D),
            "bytes": int(self.merged.bytes_D.sum()),
            "public_alone": self.public.bits_per_byte,
            "own_hybrid": self.hybrid.bits_per_byte,
            "merged": self.merged.bits_per_byte,
            **{
                name: {"value": d.value, "half_width": d.half_width, "includes_zero": d.includes_zero}
                for name, d in (("gain", self.gain), ("regret", self.regret))
            },
        }
