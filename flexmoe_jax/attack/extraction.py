"""How much of its training text a model gives back: the paper's protocol, and discoverable extraction.

The paper (FlexOlmo, arXiv 2507.07024, section 5.3; its script `src/scripts/utils/extraction_analysis.py`): from a
random place of a document 32 tokens are the prompt; ten continuations, which end with the 256th token of prompt and
continuation, are drawn with top-k 50 and top-p 0.95 at temperature 1; the document is extracted if one of them has a
similarity of at least 0.9: 1 - Levenshtein distance / longer length, over characters, the prompt included on both
sides.

(n, p)-discoverable extraction (Hayes et al., arXiv 2410.19482) needs no samples: z, the probability that the same
sampling draws the next 50 tokens as they are, is computed; n draws give them back with probability 1 - (1 - z)^n.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest

from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import ConfigError, DataError
from flexmoe_jax.model.generate import Sampling

if TYPE_CHECKING:
    from flexmoe_jax.api import Model

SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.95)
PREFIX, TOTAL, LEAST, SUFFIX = 32, 256, 128, 50  # tokens: prompt, with its continuation, of a document, given back
SIMILARITY, PROBABILITY = 0.9, 0.5
DRAWS = (10, 1_000, 1_000_000)
_ROWS = 16  # continuations that are drawn at a time


@dataclasses.dataclass(frozen=True)
class Share:
    """`count` of `documents`, with the 95% interval of Clopper and Pearson."""

    count: int
    documents: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.documents

    @property
    def interval(self) -> tuple[float, float]:
        """Its bounds."""
        low, high = binomtest(self.count, self.documents).proportion_ci(0.95, "exact")
        return float(low), float(high)

    def describe(self) -> dict:
        """The numbers as JSON values."""
        low, high = self.interval
        return {"count": self.count, "documents": self.documents, "share": self.value, "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What was given back, one number for each passage.

    `similarity` is the highest of the samples, `continuation` that without the prompt on both sides; both are empty
    without samples. `log_z` is the log-probability of the next `SUFFIX` tokens.
    """

    similarity: np.ndarray
    continuation: np.ndarray
    log_z: np.ndarray

    def shares(self) -> dict[str, Share]:
        """{criterion: share of the passages}."""
        found = {"paper": self.similarity, "continuation": self.continuation}
        shares = {name: Share(int((v >= SIMILARITY).sum()), len(v)) for name, v in found.items() if len(v)}
        z = np.exp(self.log_z.astype(np.float64))
        for n in DRAWS:
            with np.errstate(divide="ignore"):
                given = n * np.log1p(-z) <= math.log1p(-PROBABILITY)
            shares[f"{n:,} draws"] = Share(int(given.sum()), len(z))
        return shares


def passages(documents: Sequence[str], tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[list[int]]:
    """Random pieces, of at most `TOTAL` tokens, of `count` random documents of at least `LEAST` tokens.

    A model reads at most `length` tokens. DataError if that is too short, or no document is long enough.
    """
    total = min(TOTAL, length - (tokenizer.bos_id is not None))
    if total < PREFIX + SUFFIX:
        what = f"the model reads {length} tokens, and a prompt of {PREFIX} with the next {SUFFIX} is asked for"
        raise DataError(what, "use a model of a longer max_seq_len")
    source = np.random.default_rng(seed)
    found: list[list[int]] = []
    for n in source.permutation(len(documents)):
        if len(found) == count:
            break
        ids = tokenizer.encode(documents[n])
        if len(ids) >= LEAST:
            start = int(source.integers(0, max(len(ids) - total, 1)))
            found.append(ids[start : start + total])
    if not found:
        raise DataError(f"no document of {len(documents)} has {LEAST} tokens", "give longer documents")
    return found


def extract(model: "Model", rows: Sequence[list[int]], samples: int = 10, seed: int = 0) -> Extraction:
    """Attacks the passages `rows`; with 0 `samples` only by discoverable extraction.

    ConfigError without rapidfuzz (extra `attack`) where there are samples.
    """
    if samples:
        _similarity(model.tokenizer, [], [], [])  # before hours of work
    before = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    statistics = model.statistics([[*before, *row[: PREFIX + SUFFIX]] for row in rows], SAMPLING)
    log_z = np.array([s.drawn[len(before) + PREFIX - 1 :].sum(dtype=np.float64) for s in statistics])
    best = np.zeros((2, len(rows))) if samples else np.zeros((2, 0))
    work = [n for n in range(len(rows)) for _ in range(samples)]
    for at in range(0, len(work), _ROWS):
        part = work[at : at + _ROWS]
        prompts = [[*before, *rows[n][:PREFIX]] for n in part]
        longest = max(len(row) for row in rows) - PREFIX
        made = model.continuations(
            prompts, max_new_tokens=longest, sampling=SAMPLING, seed=(1_000_003 * seed + at) % 2**31
        )
        for n, ids in zip(part, made, strict=True):
            length = len(rows[n]) - PREFIX
            pair = (ids[:length], rows[n][PREFIX:])
            found = [_similarity(model.tokenizer, rows[n][:PREFIX], *pair), _similarity(model.tokenizer, [], *pair)]
            best[:, n] = np.maximum(best[:, n], found)
    return Extraction(best[0], best[1], log_z)


def _similarity(tokenizer: Tokenizer, prefix: list[int], made: list[int], true: list[int]) -> float:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ConfigError("samples are compared by rapidfuzz", "pip install 'flexmoe_jax[attack]'") from error
    texts = [tokenizer.decode([*prefix, *ids]) for ids in (made, true)]
    return float(Levenshtein.normalized_similarity(*texts))
