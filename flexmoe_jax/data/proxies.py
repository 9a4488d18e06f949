"""Proxy data: public documents that look like an owner's, found without the owner's documents (paper section 3.3).

The owner trains a classifier, "mine or public?", on sentence embeddings of its documents and of public ones, and gives
away the classifier alone: as many numbers as the encoder is wide, and one more. Whoever holds the public documents
keeps those it finds most like the owner's.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flexmoe_jax.data.embedding import (
    DEFAULT_ENCODER,
    MINIMUM_DOCUMENTS,
    embed_documents,
    encoder_digest,
    encoder_name,
    sample_documents,
    write_numbers,
)
from flexmoe_jax.data.sources import Document
from flexmoe_jax.errors import DataError
from flexmoe_jax.tree import check_owner_name

FORMAT = "flexmoe-classifier-1"
HELD_OUT = 5  # one document in so many is not trained on


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Log odds that a document is the owner's: `weights` . embedding + `intercept`; `weights` float32 [W].

    `accuracy` is on `held_out` documents of either kind that it was not trained on, `documents` those it was.
    """

    weights: np.ndarray
    intercept: float
    encoder: str
    encoder_digest: str
    accuracy: float
    documents: int
    held_out: int

    def __post_init__(self):
        if self.weights.dtype != np.float32 or self.weights.ndim != 1 or not self.weights.size:
            raise DataError(f"a classifier of {self.weights.dtype} {self.weights.shape}", "it is float32 [W]")
        if not np.isfinite(self.weights).all() or not np.isfinite(self.intercept):
            raise DataError("the classifier holds NaN or infinity", "train it again")

    def log_odds(self, embeddings) -> np.ndarray:
        """Embeddings [n, W] -> float64 [n]; above 0: rather the owner's than public."""
        return np.asarray(embeddings, np.float64) @ self.weights.astype(np.float64) + self.intercept

    def save(self, path: str | Path) -> None:
        """Write it as JSON; the numbers are exact."""
        write_numbers(path, {"format": FORMAT, **dataclasses.asdict(self), "weights": self.weights.tolist()})

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """What `save` wrote; DataError for anything else."""
        remedy = "make it with `flexmoe train-classifier`"
        try:
            content = json.loads(Path(path).read_bytes())
            if content.pop("format") != FORMAT:
                raise ValueError(f"not of the format {FORMAT}")
            return cls(**content | {"weights": np.asarray(content["weights"], np.float32)})
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist", remedy) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path} is no classifier: {error!r}", remedy) from error


def train_classifier(
    own: Iterable[Document], public: Iterable[Document], *, encoder: str | Path = DEFAULT_ENCODER, count: int = 1000,
    seed: int = 0,
) -> Classifier:  # fmt: skip
    """Logistic regression on embeddings of `count` documents of either kind, sampled as a domain vector's are.

    Raises DataError for fewer than 16 different documents of a kind.
    """
    from sklearn.linear_model import LogisticRegression

    kinds = [sample_documents(documents, count, seed)[0] for documents in (public, own)]
    for name, texts in zip(("public", "own"), kinds, strict=True):
        if len(set(texts)) < MINIMUM_DOCUMENTS:
            raise DataError(
                f"{len(set(texts))} different {name} documents; a classifier takes at least {MINIMUM_DOCUMENTS}",
                "give more documents: what it learns of a few would expose them",
            )
    embedded = embed_documents([text for texts in kinds for text in texts], encoder)
    owned = np.repeat([0, 1], [len(texts) for texts in kinds])
    place = np.concatenate([np.arange(len(texts)) for texts in kinds])
    held_out = place % HELD_OUT == 0
    model = LogisticRegression(max_iter=1000, C=10.0, class_weight="balanced")
    model.fit(embedded[~held_out], owned[~held_out])
    accuracy = float(np.mean([(model.predict(embedded[held_out & (owned == k)]) == k).mean() for k in (0, 1)]))
    return Classifier(
        model.coef_[0].astype(np.float32), float(model.intercept_[0]), encoder_name(encoder), encoder_digest(encoder),
        accuracy, int((~held_out).sum()), int(held_out.sum()),
    )  # fmt: skip


def find_proxies(
    classifiers: Mapping[str, Classifier], documents: Iterable[Document], out: Path, *, count: int, of: int,
    encoder: str | Path = DEFAULT_ENCODER, seed: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Writes the folder `out`/OWNER of `count` documents for each owner; returns its highest and lowest log odds.

    They are those with the highest odds among a sample of `of` public `documents`, the likeliest first; each line of
    `train.jsonl` has its `log_odds`. Raises DataError for another encoder and for a folder that exists.
    """
    found = encoder_digest(encoder)
    for owner, classifier in classifiers.items():
        check_owner_name(owner)
        if classifier.encoder_digest != found:
            raise DataError(
                f"the classifier of {owner!r} reads embeddings of {classifier.encoder} "
                f"({classifier.encoder_digest[:12]}), not of {encoder_name(encoder)} ({found[:12]})",
                "give the encoder it was trained with",
            )
        if (out / owner).exists():
            raise DataError(f"{out / owner} already exists", "give a new folder")
    sample = sample_documents(documents, of, seed)[0]
    if not 1 <= count <= len(sample):
        raise DataError(f"{count} proxies out of {len(sample)} public documents", "ask for fewer, or give more of them")
    embedded = embed_documents(sample, encoder)
    for owner, classifier in classifiers.items():
        if classifier.weights.size != embedded.shape[1]:
            raise DataError(
                f"the classifier of {owner!r} has {classifier.weights.size} weights, the encoder is "
                f"{embedded.shape[1]} wide",
                "ask its owner for another",
            )
    ranges = {}
    for owner, classifier in classifiers.items():
        odds = classifier.log_odds(embedded)
        best = np.argsort(-odds, kind="stable")[:count]
        lines = [json.dumps({"text": sample[n], "log_odds": float(odds[n])}, ensure_ascii=False) for n in best]
        partial = out / f".{owner}.{os.getpid()}"
        partial.mkdir(parents=True)
        (partial / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(partial, out / owner)
        ranges[owner] = float(odds[best[0]]), float(odds[best[-1]])
    return ranges
