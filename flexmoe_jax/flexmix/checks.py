"""Acceptance checks of a mix: sizes, splits without leaks, and domains that differ measurably."""

import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from flexmoe_jax.data.corpus import SPLITS
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.errors import Check
from flexmoe_jax.flexmix.build import read_mix
from flexmoe_jax.flexmix.recipes import fingerprint

MIN_DOMAIN_BYTES = 2_500_000
MIN_ACCURACY = 0.85
MIN_BITS_MARGIN = 0.0
BIGRAM_TRAIN_BYTES = 1_000_000  # per domain; files are ordered by hash, so their start is a random sample
BIGRAM_HELDOUT_BYTES = 200_000
CENTROID_DOCUMENTS = 120
CLASSIFIED_DOCUMENTS = 80


def check(
    mix_dir: str | pathlib.Path,
    tokenize: Callable[[str], list[int]],
    encode: Callable[[list[str]], np.ndarray] | None = None,
) -> list[Check]:
    """All acceptance checks of the mix in `mix_dir`.

    `tokenize` returns the token ids of a text, for the bigram models. `encode` returns embeddings [n, W] of n texts, of
    any norm; without it the nearest-centroid check is skipped. In both checks the public class consists of its own
    documents, without the look-alikes taken from closed domains. Raises DataError for a folder that is not a mix.
    """
    mix_dir = pathlib.Path(mix_dir)
    domains = read_mix(mix_dir)["domains"]
    checks = [*_sizes(mix_dir, domains), *_leaks(mix_dir, domains), _bigrams(mix_dir, domains, tokenize)]
    return [*checks, _centroids(mix_dir, domains, encode)] if encode else checks


def _sizes(mix_dir: pathlib.Path, domains: list[str]) -> Iterator[Check]:
    for name in domains:
        documents = (d for split in SPLITS for d in read_documents(mix_dir / name, split))
        size = sum(len(document.text.encode()) for document in documents)
        detail = f"{size / 1e6:.2f} MB (required: >= {MIN_DOMAIN_BYTES / 1e6:.1f} MB)"
        yield Check(f"size of {name}", size >= MIN_DOMAIN_BYTES, detail)


def _leaks(mix_dir: pathlib.Path, domains: list[str]) -> Iterator[Check]:
    """Groups in more than one place (an owner's training part, a held-out part, the public one), and equal texts."""
    places: defaultdict[str, set] = defaultdict(set)
    copies: Counter[str] = Counter()
    for name in domains:
        for split in SPLITS:
            for document in read_documents(mix_dir / name, split):
                places[document.group].add((name, split))
                copies[fingerprint(document.text)] += 1
    torn = sum(len(found) > 1 for found in places.values())
    double = sum(count > 1 for count in copies.values())
    yield Check("groups in one place only", torn == 0, f"{torn} of {len(places)} groups in several (required: 0)")
    yield Check("no exact duplicates", double == 0, f"{double} of {len(copies)} texts more than once (required: 0)")


def _bigrams(mix_dir: pathlib.Path, domains: list[str], tokenize: Callable[[str], list[int]]) -> Check:
    """Bits per byte of every domain's held-out text under every domain's bigram model: its own must be the lowest."""
    heldout = {name: _tokens(mix_dir / name, "heldout", BIGRAM_HELDOUT_BYTES, tokenize, name) for name in domains}
    train = {name: _tokens(mix_dir / name, "train", BIGRAM_TRAIN_BYTES, tokenize, name) for name in domains}
    vocabulary = 1 + max(int(tokens.max()) for tokens, _ in [*heldout.values(), *train.values()])
    models = {name: Bigram(tokens, vocabulary) for name, (tokens, _) in train.items()}
    margins = {}
    for name, (tokens, size) in heldout.items():
        bits = {other: model.bits(tokens) / size for other, model in models.items()}
        own = bits.pop(name)
        margins[name] = min(bits.values()) - own if bits else np.inf
    worst = min(margins, key=margins.__getitem__)
    return Check(
        "own bigram model is best",
        margins[worst] > MIN_BITS_MARGIN,
        f"by {margins[worst]:.2f} bits per byte or more (least: {worst}; required: > {MIN_BITS_MARGIN:.0f} for all)",
    )


def _tokens(
    folder: pathlib.Path, split: str, max_bytes: int, tokenize: Callable[[str], list[int]], domain: str
) -> tuple[np.ndarray, int]:
    """Token ids of the first of the domain's own documents, about `max_bytes` of text, and the bytes of that text."""
    ids: list[int] = []
    size = 0
    for document in read_documents(folder, split):
        if size >= max_bytes:
            break
        if document.domain == domain:
            ids += tokenize(document.text)
            size += len(document.text.encode())
    return np.asarray(ids, np.int64), size


class Bigram:
    """p(b | a) = w(a) c(ab)/c(a) + (1 - w(a)) p(b) with w(a) = c(a) / (c(a) + followers(a)) (Witten and Bell).

    p(b) likewise mixes token frequency with the uniform distribution over the vocabulary.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int) -> None:
        count = np.bincount(tokens, minlength=vocabulary)
        kinds = np.count_nonzero(count)
        self.vocabulary = vocabulary
        self.unigram = (count + kinds / vocabulary) / (len(tokens) + kinds)
        self.pairs, self.counts = np.unique(tokens[:-1] * vocabulary + tokens[1:], return_counts=True)
        self.context = np.bincount(tokens[:-1], minlength=vocabulary)
        self.followers = np.bincount(self.pairs // vocabulary, minlength=vocabulary)

    def bits(self, tokens: np.ndarray) -> float:
        """Bits for all of `tokens`; the first is predicted only by its frequency."""
        before, after = tokens[:-1], tokens[1:]
        codes = before * self.vocabulary + after
        at = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == codes, self.counts[at], 0)
        followers = self.followers[before]
        weight = np.maximum(self.context[before] + followers, 1)
        back_off = np.where(followers > 0, followers, 1)
        chance = (seen + back_off * self.unigram[after]) / weight
        return float(-np.log2(chance).sum() - np.log2(self.unigram[tokens[0]]))


def _centroids(mix_dir: pathlib.Path, domains: list[str], encode: Callable[[list[str]], np.ndarray]) -> Check:
    """How often a held-out document is nearest, by cosine, to the mean of its own domain's training documents."""
    centroids = [_unit(encode(_texts(mix_dir / name, "train", CENTROID_DOCUMENTS, name))).mean(0) for name in domains]
    centroids_CW = _unit(np.stack(centroids))
    right = [
        (_unit(encode(_texts(mix_dir / name, "heldout", CLASSIFIED_DOCUMENTS, name))) @ centroids_CW.T).argmax(1) == at
        for at, name in enumerate(domains)
    ]
    accuracy = float(np.mean([hits.mean() for hits in right]))
    worst = min(range(len(domains)), key=lambda at: right[at].mean())
    return Check(
        "nearest-centroid accuracy",
        accuracy >= MIN_ACCURACY,
        f"{accuracy:.3f} (lowest: {domains[worst]} {right[worst].mean():.2f}; required: >= {MIN_ACCURACY})",
    )


def _texts(folder: pathlib.Path, split: str, count: int, domain: str) -> list[str]:
    own = (document.text for document in read_documents(folder, split) if document.domain == domain)
    return [text for text, _ in zip(own, range(count), strict=False)]


def _unit(vectors: npt.ArrayLike) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
