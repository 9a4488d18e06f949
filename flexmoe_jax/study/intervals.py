"""Means with 95% intervals over seeds and documents: a paired bootstrap.

Every system is scored on the same documents under the same seeds, so one set of resamples serves all systems, and the
difference of two systems is taken resample by resample (Koehn, Statistical Significance Tests for Machine Translation,
EMNLP 2004).
"""

import dataclasses

import numpy as np
import numpy.typing as npt

SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


class Bootstrap:
    """Resamples of seeds, and of documents within each domain; the same ones for every system."""

    def __init__(self, seeds: int, documents: dict[str, int], samples: int = SAMPLES, seed: int = 0):
        generator = np.random.Generator(np.random.Philox(seed))
        self.seed_counts = _counts(generator, seeds, samples)
        self.doc_counts = {domain: _counts(generator, n, samples) for domain, n in documents.items()}

    def ratio(self, domain: str, numerator_SD: npt.ArrayLike, denominator_D: npt.ArrayLike) -> np.ndarray:
        """sum(numerator) / sum(denominator), averaged over seeds: float64 [1 + samples].

        The first entry is of all seeds and documents, the others of one resample each. `numerator_SD` is [seeds,
        documents]; `denominator_D` [documents] is the same under every seed.
        """
        counts_RD, counts_RS = self.doc_counts[domain], self.seed_counts
        ratio_RS = counts_RD @ np.asarray(numerator_SD, np.float64).T / (counts_RD @ denominator_D)[:, None]
        return (counts_RS * ratio_RS).sum(1) / counts_RS.sum(1)


def summary(values_R: np.ndarray) -> Interval:
    """The first value, with the 2.5% and 97.5% quantiles of the others: its resamples."""
    low, high = np.quantile(values_R[1:], (0.025, 0.975))
    return Interval(float(values_R[0]), float(low), float(high))


def _counts(generator: np.random.Generator, n: int, samples: int) -> np.ndarray:
    """How often each of n is drawn, [1 + samples, n]: first once each, then in `samples` draws with replacement."""
    drawn = generator.multinomial(n, np.full(n, 1 / n), samples)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)
