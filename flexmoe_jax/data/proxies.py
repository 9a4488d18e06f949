"""Proxy data: public documents that resemble an owner's, found without access to the owner's (paper section 3.3).

The owner trains a classifier, own or public, on sentence embeddings of its documents and of public documents, and
releases only the classifier: as many numbers as the encoder is wide, and one more. The holder of the public documents
keeps those that the classifier ranks highest.

Legend: W width of the encoder, n documents.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from flexmoe_jax.data.embedding import (
    DEFAULT_ENCODER,
    MINIMUM_DOCUMENTS,
    embed_documents,
    encoder_digest,
    encoder_name,
    sample_documents,
)
from flexmoe_jax.data.sources import Document
from flexmoe_jax.errors import DataError, FlexMoEError
from flexmoe_jax.files import new_directory, write_json
from flexmoe_jax.foreign import read_bytes
from flexmoe_jax.json_files import MAX_JSON_BYTES, parse_json
from flexmoe_jax.tree import check_owner_name

FORMAT = "flexmoe-classifier-1"
HELD_OUT = 5  # one document in five is held out


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Log odds that a document is the owner's: `weights` . embedding + `intercept`.

    `documents` is the number of training documents, `accuracy` the accuracy on `held_out` others, both kinds weighted
    equally.
    """

    weights: np.ndarray  # float32 [W]
    intercept: float
    encoder: str
    encoder_digest: str
    accuracy: float
    documents: int
    held_out: int

    def __post_init__(self) -> None:
        if self.weights.dtype != np.float32 or self.weights.ndim != 1 or not self.weights.size:
            raise DataError(f"a classifier of {self.weights.dtype} {self.weights.shape}", "it must be float32 [W]")
        if not np.isfinite(self.weights).all() or not np.isfinite(self.intercept):
            raise DataError("the classifier holds NaN or infinity", "train it again")

    def log_odds(self, embeddings: npt.ArrayLike) -> np.ndarray:
        """Embeddings [n, W] -> float64 [n]; positive means more likely the owner's than public."""
        return np.asarray(embeddings, np.float64) @ self.weights.astype(np.float64) + self.intercept

    def save(self, path: str | pathlib.Path) -> None:
        """Writes it as JSON; the numbers are exact. ArtifactError where `path` cannot be written."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self), "weights": self.weights.tolist()})

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Classifier":
        """Reads what `save` wrote; DataError for anything else."""
        remedy = "make it with `flexmoe train-classifier`"
        try:
            content = parse_json(read_bytes(pathlib.Path(path), MAX_JSON_BYTES, DataError), path)
            if content.pop("format") != FORMAT:
                raise ValueError(f"not of the format {FORMAT}")
            return cls(**content | {"weights": np.asarray(content["weights"], np.float32)})
        except FlexMoEError as error:
            raise DataError(f"{path} is not a classifier: {error.what}", remedy) from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is not a classifier: {error!r}", remedy) from error


def train_classifier(
    own: Iterable[Document],
    public: Iterable[Document],
    *,
    encoder: str | pathlib.Path = DEFAULT_ENCODER,
    count: int = 1000,
    seed: int = 0,
) -> Classifier:
    """Logistic regression on embeddings of `count` documents of either kind, sampled as for a domain vector.

    Raises DataError for fewer than 16 different documents of a kind.
    """
    from sklearn.linear_model import LogisticRegression

    kinds = [sample_documents(documents, count, seed)[0] for documents in (public, own)]
    for name, texts in zip(("public", "own"), kinds, strict=True):
        if len(set(texts)) < MINIMUM_DOCUMENTS:
            raise DataError(
                f"{len(set(texts))} different {name} documents; a classifier needs at least {MINIMUM_DOCUMENTS}",
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
        weights=model.coef_[0].astype(np.float32),
        intercept=float(model.intercept_[0]),
        encoder=encoder_name(encoder),
        encoder_digest=encoder_digest(encoder),
        accuracy=accuracy,
        documents=int((~held_out).sum()),
        held_out=int(held_out.sum()),
    )


def find_proxies(
    classifiers: Mapping[str, Classifier],
    documents: Iterable[Document],
    out: pathlib.Path,
    *,
    count: int,
    of: int,
    encoder: str | pathlib.Path = DEFAULT_ENCODER,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Writes the folder `out`/OWNER of `count` documents per owner; returns the highest and lowest log odds of each.

    Proxies are the documents with the highest log odds in a sample of `of` public `documents`, the most likely first;
    each line of `train.jsonl` has its `log_odds`. Raises DataError for another encoder, for too few documents and for a
    folder that exists; nothing is then written.
    """
    digest = encoder_digest(encoder)
    for owner, classifier in classifiers.items():
        check_owner_name(owner)
        if classifier.encoder_digest != digest:
            raise DataError(
                f"the classifier of {owner!r} reads embeddings of {classifier.encoder} "
                f"({classifier.encoder_digest[:12]}), not of {encoder_name(encoder)} ({digest[:12]})",
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
    return {o: _write_proxies(out / o, sample, c.log_odds(embedded), count) for o, c in classifiers.items()}


def _write_proxies(folder: pathlib.Path, sample: list[str], odds: np.ndarray, count: int) -> tuple[float, float]:
    best = np.argsort(-odds, kind="stable")[:count]
    lines = [json.dumps({"text": sample[n], "log_odds": float(odds[n])}, ensure_ascii=False) for n in best]
    with new_directory(folder) as partial:
        (partial / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return float(odds[best[0]]), float(odds[best[-1]])
