"""Means with 95% intervals over seeds and documents: a paired bootstrap.

Every system is scored on the same documents under the same seeds, so one set of resamples serves all and differences
of two systems are taken resample by resample (Koehn, Statistical Significance Tests for Machine Translation, 2004).
"""

import math

import numpy as np

SAMPLES = 1000


class Bootstrap:
    """Resamples of seeds, and of documents within each domain; the same for every system asked about."""

    def __init__(self, seeds: int, documents: dict[str, int], samples: int = SAMPLES, seed: int = 0):
        generator = np.random.Generator(np.random.Philox(seed))
        self.seed_counts = _counts(generator, seeds, samples)
        self.doc_counts = {domain: _counts(generator, n, samples) for domain, n in documents.items()}

    def ratio(self, domain: str, numerator_SD, denominator_D) -> np.ndarray:
        """[1 + samples] of sum(numerator) / sum(denominator), averaged over seeds; the first is of all there is.

        `numerator_SD` [seeds, documents] is summed over documents, `denominator_D` [documents] is the same under
        every seed.
        """
        counts_RD, counts_RS = self.doc_counts[domain], self.seed_counts
        ratio_RS = counts_RD @ np.asarray(numerator_SD, np.float64).T / (counts_RD @ denominator_D)[:, None]
        return (counts_RS * ratio_RS).sum(1) / counts_RS.sum(1)


def bits_per_byte(bootstrap: Bootstrap, domain: str, nats_SD, bytes_D) -> np.ndarray:
    """[1 + samples] bits per byte of one domain."""
    return bootstrap.ratio(domain, np.asarray(nats_SD) / math.log(2), bytes_D)


def summary(values_R: np.ndarray) -> dict[str, float]:
    """The value, and the 2.5% and 97.5% quantiles of its resamples."""
    low, high = np.quantile(values_R[1:], (0.025, 0.975))
    return {"value": float(values_R[0]), "low": float(low), "high": float(high)}


def _counts(generator, n: int, samples: int) -> np.ndarray:
    """How often each of n is drawn, [1 + samples, n]: first once each, then in `samples` draws with replacement."""
    drawn = generator.multinomial(n, np.full(n, 1 / n), samples)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)
