"""Scores of every system on the same held-out texts: token log-likelihoods, computed once and kept on disk."""

import dataclasses
import functools
import io
import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flexmoe_jax.api import Model, load
from flexmoe_jax.data.sources import Document, read_documents
from flexmoe_jax.errors import DataError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.study.baselines import Nats, choose, soup
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.continuation import make_items
from flexmoe_jax.study.workshop import Artifacts
from flexmoe_jax.tree import PUBLIC

log = logging.getLogger(__name__)

PIECE = 400  # characters of one domain before the other's turn, in a document that interleaves two
TASKS = ("heldout", "choice")

Key = tuple[str, str]  # (domain, task) of a set of texts


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts by domain: held-out documents, and the texts of the four-way continuation task.

    A domain like "code + math" has documents that interleave two domains, and no continuation task.
    """

    heldout: dict[str, list[str]]
    choice: dict[str, list[str]]

    def sets(self) -> Iterator[tuple[Key, list[str]]]:
        """((domain, task), texts) of each set that is not empty."""
        for domain in self.heldout:
            for task in TASKS:
                if texts := getattr(self, task)[domain]:
                    yield (domain, task), texts


@dataclasses.dataclass(frozen=True)
class SystemScore:
    """Nats per token of each text by (domain, task); `share[domain]` [L, E] is the routed weight on held-out text."""

    nats: dict[Key, Nats]
    share: dict[str, np.ndarray]


def make_texts(config: StudyConfig, mix: pathlib.Path) -> Texts:
    """The texts on which every system is scored with every seed. Raises DataError for a domain without any."""
    every = {name: [d.text for d in held_out(mix / name)] for name in (PUBLIC, *config.owners)}
    cut = {name: [text[: config.document_chars] for text in texts] for name, texts in every.items()}
    heldout = {name: _first(texts, config.heldout_bytes) for name, texts in cut.items()}
    choice = {name: make_items(texts, config.choice_items) for name, texts in every.items()}
    for pair in itertools.pairwise(config.owners):
        name = " + ".join(pair)
        documents = zip(*(_first(cut[part][::-1], config.heldout_bytes // 2) for part in pair), strict=False)
        heldout[name], choice[name] = [_interleave(*both) for both in documents], []
    return Texts(heldout, choice)


def held_out(folder: pathlib.Path, validation: bool = False) -> list[Document]:
    """Held-out documents of a domain of the mix: those that are reported, or those that choose, every fourth.

    Their order is random. Nothing is trained on either part, so documents of one group may be in both.
    """
    documents = enumerate(read_documents(folder, "heldout"))
    return [document for n, document in documents if (n % 4 == 0) == validation]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What the systems of one seed are scored with."""

    config: StudyConfig
    artifacts: Artifacts
    texts: Texts
    mix: pathlib.Path
    home: pathlib.Path
    """The seed's folder: scores are kept in `scores/`, posteriors of prompt routing beside the folder."""
    scores: dict[str, SystemScore] = dataclasses.field(default_factory=dict)
    """Of the systems scored so far, by name."""

    @functools.cached_property
    def load(self) -> Callable[[pathlib.Path], Model]:
        """Loads a model directory; the last one stays in memory."""
        return functools.lru_cache(maxsize=1)(load)

    def kept(self, name: str, score: "Scorer") -> SystemScore:
        """The scores of the system `name`: read from the disk, or computed and written."""
        path = self.home / "scores" / f"{re.sub('[ /]', '_', name)}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, _to_npz(score(self)))
            log.info(f"scored {name}")
        return _from_npz(path)

    @functools.cached_property
    def posteriors(self) -> dict[Key, np.ndarray]:
        """Posterior probabilities of the experts' domains for each text, float64 [texts, experts].

        Logistic regression on sentence embeddings of training documents, the same for every seed.
        """
        path = self.home.parent / "posteriors.npz"  # of this study only: the texts of others may differ
        if not path.exists():
            write_bytes(path, _npz({"/".join(key): values for key, values in self._fit_posteriors().items()}))
        with np.load(path) as arrays:
            return {(key.split("/")[0], key.split("/")[1]): arrays[key] for key in arrays}

    def _fit_posteriors(self) -> dict[Key, np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        from flexmoe_jax.data.embedding import embed_documents

        count = self.config.classifier_documents
        train = [_take(read_documents(self.mix / name, "train"), count) for name in (PUBLIC, *self.config.owners)]
        labels = np.repeat(np.arange(len(train)), [len(texts) for texts in train])
        classifier = LogisticRegression(max_iter=1000, C=10.0)
        classifier.fit(embed_documents([text for texts in train for text in texts]), labels)
        return {key: classifier.predict_proba(embed_documents(texts)) for key, texts in self.texts.sets()}


Scorer = Callable[[Bench], SystemScore]


def of_model(name: str, change: Callable[[Model], Model] | None = None, uniform: bool = False) -> Scorer:
    """Scores the model of the system `name`, changed by `change`; `uniform` mixes its experts with equal weights."""

    def score(bench: Bench) -> SystemScore:
        model = bench.load(bench.artifacts.models[name])
        return _score(model if change is None else change(model), bench.texts, uniform)

    return score


def selected(experts: Iterable[str]) -> Callable[[Model], Model]:
    """The model of only these experts."""
    return lambda model: model.select(experts)


def with_top_k(k: int) -> Callable[[Model], Model]:
    """The model with `k` experts active per token."""
    return lambda model: dataclasses.replace(model, wanted_top_k=k)


def with_router(factor: float, shift: float) -> Callable[[Model], Model]:
    """The model with all router rows and biases times `factor`, and owners' biases plus `shift`."""

    def change(model: Model) -> Model:
        experts = {}
        for name, expert in model.params["experts"].items():
            bias = np.minimum(expert["bias"], 0) * factor + (0 if name == PUBLIC else shift)
            experts[name] = {**expert, "router": expert["router"] * np.float32(factor), "bias": bias.astype(np.float32)}
        return dataclasses.replace(model, params={**model.params, "experts": experts})

    return change


def uniform_soup(models: Sequence[str]) -> Scorer:
    """Scores the mean of the parameters of the systems `models`."""

    def score(bench: Bench) -> SystemScore:
        whole = {name: load(bench.artifacts.models[name]) for name in models}
        params = soup({name: model.params for name, model in whole.items()})
        return _score(dataclasses.replace(whole[models[0]], params=params), bench.texts)

    return score


def weighted_soup(models: Sequence[str]) -> Scorer:
    """Scores a soup for each set of texts, weighted by the mean posterior of the experts' domains on its texts."""

    def score(bench: Bench) -> SystemScore:
        whole, nats = {name: load(bench.artifacts.models[name]) for name in models}, {}
        params = {name: model.params for name, model in whole.items()}
        for key, texts in bench.texts.sets():
            weights = dict(zip(models, bench.posteriors[key].mean(0), strict=True))
            mean = dataclasses.replace(whole[models[0]], params=soup(params, weights))
            nats[key] = mean.score(texts).token_nats
        return SystemScore(nats, {})

    return score


def mixture(models: Sequence[str], mix: Callable[[dict[str, Nats]], Nats]) -> Scorer:
    """Mixes the nats of the systems `models`, which are scored already, set by set."""

    def score(bench: Bench) -> SystemScore:
        keys = [key for key, _ in bench.texts.sets()]
        return SystemScore({key: mix({name: bench.scores[name].nats[key] for name in models}) for key in keys}, {})

    return score


def prompt_routing(models: Sequence[str]) -> Scorer:
    """Scores each text with the one of the systems `models` whose domain has the highest posterior."""

    def score(bench: Bench) -> SystemScore:
        nats = {}
        for key, _ in bench.texts.sets():
            best = [models[i] for i in bench.posteriors[key].argmax(1)]
            nats[key] = choose({name: bench.scores[name].nats[key] for name in models}, best)
        return SystemScore(nats, {})

    return score


def _score(model: Model, texts: Texts, uniform: bool = False) -> SystemScore:
    nats, share = {}, {}
    for (domain, task), some in texts.sets():
        score = model.score(some, uniform=uniform)
        nats[domain, task] = score.token_nats
        if task == "heldout":
            share[domain] = score.share_LE
    return SystemScore(nats, share)


def _take(documents: Iterable[Document], count: int) -> list[str]:
    return [document.text for document in itertools.islice(documents, count)]


def _first(texts: list[str], size: int) -> list[str]:
    """The first texts that have at most `size` bytes together, but at least one."""
    if not texts:
        raise DataError("a domain has no held-out document", "build the mix again")
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: max(1, int(np.searchsorted(sizes, size, side="right")))]


def _interleave(a: str, b: str) -> str:
    pieces = [[text[at : at + PIECE] for at in range(0, len(text), PIECE)] for text in (a, b)]
    return "\n\n".join(piece for both in zip(*pieces, strict=False) for piece in both)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _to_npz(score: SystemScore) -> bytes:
    arrays = {}
    for (domain, task), nats in score.nats.items():
        arrays[f"nats/{domain}/{task}"] = np.concatenate(nats).astype(np.float32)
        arrays[f"lengths/{domain}/{task}"] = np.array([len(doc) for doc in nats])
    return _npz(arrays | {f"share/{domain}": share for domain, share in score.share.items()})


def _from_npz(path: pathlib.Path) -> SystemScore:
    nats, share = {}, {}
    with np.load(path) as arrays:
        for key in arrays:
            what, _, rest = key.partition("/")
            if what == "nats":
                domain, task = rest.split("/")
                nats[domain, task] = np.split(arrays[key], np.cumsum(arrays[f"lengths/{rest}"])[:-1])
            elif what == "share":
                share[rest] = arrays[key]
    return SystemScore(nats, share)
