"""The four-way continuation task: which of four continuations from the same domain is the true one?

The four texts of an item have the same context and continuations of the same number of characters, so total
log-likelihoods are compared as they are. A model is right when the true text is the most likely. Chance is 25%.
"""

import numpy as np
import numpy.typing as npt

CHOICES = 4
CONTEXT, CONTINUATION = 384, 128  # characters


def make_items(texts: list[str], count: int, seed: int = 0) -> list[str]:
    """4 * n texts, n at most `count`: each item's true text, then three with the continuations of other documents.

    Every document that is long enough gives one item, cut at a place drawn from `seed`.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    long = [text for text in texts if len(text) >= CONTEXT + CONTINUATION][:count]
    starts = [int(generator.integers(len(text) - CONTEXT - CONTINUATION + 1)) for text in long]
    contexts = [text[at : at + CONTEXT] for text, at in zip(long, starts, strict=True)]
    endings = [text[at + CONTEXT : at + CONTEXT + CONTINUATION] for text, at in zip(long, starts, strict=True)]
    items = []
    for n, context in enumerate(contexts):
        others = [i for i in range(len(endings)) if endings[i] != endings[n]]
        if len(others) < CHOICES - 1:
            continue
        wrong = generator.choice(others, CHOICES - 1, replace=False)
        items += [context + ending for ending in (endings[n], *(endings[i] for i in wrong))]
    return items


def correct(nats: npt.ArrayLike) -> np.ndarray:
    """Total nats [4n] of the texts of `make_items` -> float64 [n]: 1 where the true text is the most likely, else 0.

    A tie with a wrong text counts as wrong.
    """
    totals_n4 = np.asarray(nats, np.float64).reshape(-1, CHOICES)
    return (totals_n4[:, 0] < totals_n4[:, 1:].min(1)).astype(np.float64)
