"""Whether a document was trained on can be told from a model: scores that are higher for members, and what they tell.

    loss        mean log-probability of a token (Yeom et al., arXiv 1709.01604)
    zlib        log-probability over the compressed size of the text (Carlini et al., arXiv 2012.07805)
    min-k       mean of the lowest fifth of the tokens' log-probabilities (Shi et al., arXiv 2310.16789)
    min-k++     the same of (log p - mean) / deviation under the model (Zhang et al., arXiv 2404.02936)
    reference   loss minus that of the public model, which everybody has

A document is read from its start, as many tokens as a window of the model holds.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest, norm, rankdata

from flexmoe_jax.errors import ConfigError, DataError
from flexmoe_jax.model.generate import Sampling

if TYPE_CHECKING:
    from flexmoe_jax.api import Model

LOWEST = 0.2  # share of the tokens that min-k looks at
RATES = (0.01, 0.001)  # shares of false positives
FOLDS, WORDS = 5, 13


@dataclasses.dataclass(frozen=True)
class Separation:
    """How well a score tells M members from N others.

    `auc` is the probability that a member scores higher, with a 95% interval (DeLong et al., 1988); `found` {share of
    false positives: (share of members found, low, high)}, by Clopper and Pearson; a share that N others cannot show is
    left out.
    """

    auc: float
    low: float
    high: float
    found: dict[float, tuple[float, float, float]]

    @property
    def is_chance(self) -> bool:
        """Whether the AUC is not shown to be above one half."""
        return self.low <= 0.5


def separation(members_M: np.ndarray, others_N: np.ndarray) -> Separation:
    """How well scores tell members from others; DataError for fewer than two of either, or scores not finite."""
    M, N = len(members_M), len(others_N)
    scores = np.concatenate([members_M, others_N]).astype(np.float64)
    if min(M, N) < 2 or not np.isfinite(scores).all():
        count = int((~np.isfinite(scores)).sum())
        what = f"{M} members and {N} other documents, {count} of whose scores are not finite"
        raise DataError(what, "give at least two of each, hundreds for an interval that says something")
    ranks = rankdata(scores)
    above_M = (ranks[:M] - rankdata(scores[:M])) / N  # share of the others below each member
    below_N = 1 - (ranks[M:] - rankdata(scores[M:])) / M
    auc, error = float(above_M.mean()), float(np.sqrt(above_M.var(ddof=1) / M + below_N.var(ddof=1) / N))
    width = float(norm.ppf(0.975)) * error
    found = {}
    for rate in RATES:
        if (allowed := int(rate * N + 1e-9)) >= 1:
            threshold = np.sort(scores[M:])[::-1][allowed]
            count = int((scores[:M] > threshold).sum())
            interval = binomtest(count, M).proportion_ci(0.95, "exact")
            found[rate] = count / M, float(interval.low), float(interval.high)
    return Separation(auc, max(auc - width, 0.0), min(auc + width, 1.0), found)


def member_scores(
    model: "Model", texts: Sequence[str], public: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """{attack: float64 score of each text}; `reference` only with the scores of the `public` model.

    DataError for a text without a token.
    """
    rows = [[model.tokenizer.start_id, *model.tokenizer.encode(text)][: model.config.max_seq_len + 1] for text in texts]
    statistics = model.statistics(rows, Sampling(temperature=1.0))
    log_p = [s.log_p.astype(np.float64) for s in statistics]
    sizes = [len(zlib.compress(model.tokenizer.decode(row[1:]).encode())) for row in rows]
    scaled = [(lp - s.mean) / np.maximum(s.deviation, 1e-6) for lp, s in zip(log_p, statistics, strict=True)]
    scores = {
        "loss": [lp.mean() for lp in log_p],
        "zlib": [lp.sum() / size for lp, size in zip(log_p, sizes, strict=True)],
        "min-k": [_lowest(lp) for lp in log_p],
        "min-k++": [_lowest(z) for z in scaled],
    }
    found = {name: np.array(values) for name, values in scores.items()}
    return found if public is None else found | {"reference": found["loss"] - public["loss"]}


def blind_separation(members: Sequence[str], others: Sequence[str], seed: int = 0) -> Separation:
    """How well words alone, without any model, tell members from others: above chance, no attack on them says anything.

    Logistic regression on words, each document scored by a fit on the other folds (Das et al., arXiv 2406.16201).
    ConfigError without scikit-learn (extra `attack`); DataError for fewer than five documents of either.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ConfigError("the blind baseline needs scikit-learn", "pip install 'flexmoe_jax[attack]'") from error
    if min(len(members), len(others)) < FOLDS:
        what = f"{len(members)} members and {len(others)} other documents"
        raise DataError(what, f"give at least {FOLDS} of each, hundreds for an interval that says something")
    labels = np.repeat([1, 0], [len(members), len(others)])
    classifier = make_pipeline(TfidfVectorizer(max_features=20_000, token_pattern=r"\S+"), LogisticRegression(C=10.0))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(classifier, [*members, *others], labels, cv=folds, method="decision_function")
    return separation(scores[: len(members)], scores[len(members) :])


def shared(members: Sequence[str], others: Sequence[str]) -> int:
    """The number of `others` that have 13 words in a row in common with a member (all of a shorter text)."""
    known = {words for text in members for words in _runs(text)}
    return sum(not known.isdisjoint(_runs(text)) for text in others)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[n : n + WORDS]) for n in range(max(len(words) - WORDS, 0) + 1)}


def _lowest(values: np.ndarray) -> float:
    return float(np.sort(values)[: max(1, round(LOWEST * len(values)))].mean())
