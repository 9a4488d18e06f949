"""Scores of every system on the same held-out texts: token log-likelihoods, computed once and kept on disk."""

import dataclasses
import functools
import io
import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flexmoe_jax.api import Model, load
from flexmoe_jax.data.sources import Document, read_documents
from flexmoe_jax.errors import DataError
from flexmoe_jax.files import write_bytes
from flexmoe_jax.study.baselines import Nats, choose, soup
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.sharing import once
from flexmoe_jax.study.workshop import Artifacts
from flexmoe_jax.tree import PUBLIC

log = logging.getLogger(__name__)

PIECE = 400  # characters of one domain before the other's turn, in a document that interleaves two


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that systems are scored on: a held-out document, or its start."""

    text: str

    group: str
    """The document's group (play, paper, file, day, thread): texts of one group vary together."""

    ends: bool = True
    """Whether the document ends here; a text that is cut is not scored on an end of text that it does not have."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Held-out texts by domain. A domain like "code + math" has documents that interleave two domains."""

    heldout: dict[str, list[Text]]
    """What every system is scored on."""

    validation: dict[str, list[Text]]
    """Of other documents: a number of a baseline is chosen on these."""


@dataclasses.dataclass(frozen=True)
class SystemScore:
    """Nats per token of each text by domain; `share[domain]` [L, E] is the routed weight."""

    nats: dict[str, Nats]
    share: dict[str, np.ndarray]
    chosen: dict[str, float] = dataclasses.field(default_factory=dict)
    """By domain, what was chosen on validation text."""


def make_texts(config: StudyConfig, mix: pathlib.Path) -> Texts:
    """The texts on which every system is scored with every seed. Raises DataError for a domain with too few.

    Of every four held-out documents one is for validation, of which half as many bytes are taken.
    """
    names = (*config.public_sources, *config.owners)
    heldout, validation = (
        {name: [_start(d, config.document_chars) for d in held_out(mix / name, choosing)] for name in names}
        for choosing in (False, True)
    )
    return Texts(_sets(config, heldout, config.heldout_bytes), _sets(config, validation, config.heldout_bytes // 2))


def _sets(config: StudyConfig, every: dict[str, list[Text]], size: int) -> dict[str, list[Text]]:
    """Of each domain the first `size` bytes; of neighbouring owners as many of documents that interleave the two."""
    sets = {name: _first(texts, size) for name, texts in every.items()}
    for pair in itertools.pairwise(config.owners):
        sets[" + ".join(pair)] = _interleaved(*(_first(every[part][::-1], size // 2) for part in pair))
    return sets


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

        def write(path: pathlib.Path) -> None:
            write_bytes(path, _to_npz(score(self)))
            log.info(f"scored {name}")

        once(path, write)
        return _from_npz(path)

    def add(self, name: str, score: "Scorer") -> None:
        """Adds the scores of the system `name` to `scores`."""
        if name not in self.scores:
            self.scores[name] = score(self)

    def validation(self, name: str) -> dict[str, Nats]:
        """Nats of the model of the system `name` on the validation texts."""
        return self.kept(f"{name}, validation", _on_validation(name)).nats

    @functools.cached_property
    def posteriors(self) -> dict[str, np.ndarray]:
        """Posterior probabilities of the experts' domains for each text, float64 [texts, experts].

        Logistic regression on sentence embeddings of training documents, the same for every seed.
        """
        path = self.home.parent / "posteriors.npz"  # of this study only: the texts of others may differ
        once(path, lambda path: write_bytes(path, _npz(self._fit_posteriors())))
        with np.load(path) as arrays:
            return dict(arrays)

    def _fit_posteriors(self) -> dict[str, np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        from flexmoe_jax.data.embedding import embed_documents

        count = self.config.classifier_documents
        classes = (self.config.public_sources, *([owner] for owner in self.config.owners))
        train = [[t for n in c for t in _take(read_documents(self.mix / n), count // len(c))] for c in classes]
        labels = np.repeat(np.arange(len(train)), [len(texts) for texts in train])
        classifier = LogisticRegression(max_iter=1000, C=10.0)
        classifier.fit(embed_documents([text for texts in train for text in texts]), labels)
        return {
            domain: classifier.predict_proba(embed_documents([text.text for text in texts]))
            for domain, texts in self.texts.heldout.items()
        }


Scorer = Callable[[Bench], SystemScore]


def of_model(name: str, change: Callable[[Model], Model] | None = None, uniform: bool = False) -> Scorer:
    """Scores the model of the system `name`, changed by `change`; `uniform` mixes its experts with equal weights."""

    def score(bench: Bench) -> SystemScore:
        model = bench.load(bench.artifacts.models[name])
        return _score(bench, model if change is None else change(model), bench.texts.heldout, uniform)

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

    return lambda bench: _score(bench, soup_of(bench, models), bench.texts.heldout)


def soup_of(bench: Bench, models: Sequence[str]) -> Model:
    """The model whose parameters are the mean of those of the systems `models`."""
    paths = {name: bench.artifacts.models[name] for name in models}  # all are made before one is loaded
    whole = {name: load(path) for name, path in paths.items()}
    params = soup({name: model.params for name, model in whole.items()})
    return dataclasses.replace(whole[models[0]], params=params)


def weighted_soup(models: Sequence[str]) -> Scorer:
    """Scores a soup for each set of texts, weighted by the mean posterior of the experts' domains on its texts."""

    def score(bench: Bench) -> SystemScore:
        paths = {name: bench.artifacts.models[name] for name in models}
        whole = {name: load(path) for name, path in paths.items()}
        nats: dict[str, Nats] = {}
        params = {name: model.params for name, model in whole.items()}
        for domain, texts in bench.texts.heldout.items():
            weights = dict(zip(models, bench.posteriors[domain].mean(0), strict=True))
            mean = dataclasses.replace(whole[models[0]], params=soup(params, weights))
            nats |= _score(bench, mean, {domain: texts}).nats
        return SystemScore(nats, {})

    return score


def mixture(models: Sequence[str], mix: Callable[[dict[str, Nats]], Nats]) -> Scorer:
    """Mixes the nats of the systems `models`, which are scored already, domain by domain."""

    def score(bench: Bench) -> SystemScore:
        nats = {domain: {name: bench.scores[name].nats[domain] for name in models} for domain in bench.texts.heldout}
        return SystemScore({domain: mix(some) for domain, some in nats.items()}, {})

    return score


def tuned_mixture(
    models: Sequence[str], mix: Callable[[dict[str, Nats], float], Nats], grid: Sequence[float]
) -> Scorer:
    """As `mixture`, where `mix` also takes a number: the one of `grid` with the lowest total on validation text.

    It is chosen for every domain by itself, to the mixture's advantage.
    """

    def score(bench: Bench) -> SystemScore:
        tried = {name: bench.validation(name) for name in models}
        nats: dict[str, Nats] = {}
        chosen: dict[str, float] = {}
        for domain in bench.texts.heldout:
            seen = {name: tried[name][domain] for name in models}
            totals = {number: sum(doc.sum() for doc in mix(seen, number)) for number in grid}
            chosen[domain] = min(totals, key=totals.__getitem__)
            nats[domain] = mix({name: bench.scores[name].nats[domain] for name in models}, chosen[domain])
        return SystemScore(nats, {}, chosen)

    return score


def prompt_routing(models: Sequence[str]) -> Scorer:
    """Scores each text with the one of the systems `models` whose domain has the highest posterior."""

    def score(bench: Bench) -> SystemScore:
        nats = {}
        for domain in bench.texts.heldout:
            best = [models[i] for i in bench.posteriors[domain].argmax(1)]
            nats[domain] = choose({name: bench.scores[name].nats[domain] for name in models}, best)
        return SystemScore(nats, {})

    return score


def _on_validation(name: str) -> Scorer:
    return lambda bench: _score(bench, bench.load(bench.artifacts.models[name]), bench.texts.validation)


def _score(bench: Bench, model: Model, texts: dict[str, list[Text]], uniform: bool = False) -> SystemScore:
    """In windows as long as those of training: a model with a longer maximum would be padded to it."""
    nats, share = {}, {}
    for domain, some in texts.items():
        score = model.score([text.text for text in some], seq_len=bench.config.seq_len, uniform=uniform)
        # The last token is the end of text, which changes no token before it.
        pairs = zip(some, score.token_nats, strict=True)
        nats[domain] = [nats_T if text.ends else nats_T[:-1] for text, nats_T in pairs]
        share[domain] = score.share_LE
    return SystemScore(nats, share)


def _take(documents: Iterable[Document], count: int) -> list[str]:
    return [document.text for document in itertools.islice(documents, count)]


def _start(document: Document, characters: int) -> Text:
    """The first `characters` of a document."""
    return Text(document.text[:characters], document.group, len(document.text) <= characters)


def _first(texts: list[Text], size: int) -> list[Text]:
    """The first texts that have at most `size` bytes together, but at least one."""
    if not texts:
        raise DataError(
            "a domain has fewer than four held-out documents", "choose other domains, or build the mix again"
        )
    sizes = np.cumsum([len(text.text.encode()) for text in texts])
    return texts[: max(1, int(np.searchsorted(sizes, size, side="right")))]


def _interleaved(a: list[Text], b: list[Text]) -> list[Text]:
    """Texts of two domains that take turns, of the group of the part that has fewer groups."""
    groups = min(([text.group for text in texts] for texts in (a, b)), key=lambda groups: len({*groups}))
    texts = [_interleave(one.text, other.text) for one, other in zip(a, b, strict=False)]
    return [Text(text, group, ends=False) for text, group in zip(texts, groups, strict=False)]


def _interleave(a: str, b: str) -> str:
    pieces = [[text[at : at + PIECE] for at in range(0, len(text), PIECE)] for text in (a, b)]
    return "\n\n".join(piece for both in zip(*pieces, strict=False) for piece in both)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _to_npz(score: SystemScore) -> bytes:
    arrays = {}
    for domain, nats in score.nats.items():
        arrays[f"nats/{domain}"] = np.concatenate(nats).astype(np.float32)
        arrays[f"lengths/{domain}"] = np.array([len(doc) for doc in nats])
    return _npz(arrays | {f"share/{domain}": share for domain, share in score.share.items()})


def _from_npz(path: pathlib.Path) -> SystemScore:
    nats, share = {}, {}
    with np.load(path) as arrays:
        for key in arrays:
            what, _, domain = key.partition("/")
            if what == "nats":
                nats[domain] = np.split(arrays[key], np.cumsum(arrays[f"lengths/{domain}"])[:-1])
            elif what == "share":
                share[domain] = arrays[key]
    return SystemScore(nats, share)
