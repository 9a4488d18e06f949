"""What every system says of the same held-out texts: scored once, kept as token log-likelihoods, then compared.

A system is a model of ours or a mixture of several. `Texts` are, per domain, held-out documents and the texts of the
four-way continuation task; domains like "code + math" are documents that interleave two.
"""

import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from flexmoe_jax.api import Model, load
from flexmoe_jax.data.sources import read_documents
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.flops import forward_flops
from flexmoe_jax.study.baselines import Nats, branch_train_merge, causal_branch_train_merge, choose, soup
from flexmoe_jax.study.config import StudyConfig
from flexmoe_jax.study.continuation import make_items
from flexmoe_jax.study.train import METHOD, Artefacts
from flexmoe_jax.tree import PUBLIC

log = logging.getLogger(__name__)

PIECE = 400  # characters of one domain before the other's turn, in a document of two
KINDS = ("heldout", "choice")


@dataclasses.dataclass(frozen=True)
class Texts:
    """`heldout[domain]` and `choice[domain]` are lists of texts."""

    heldout: dict[str, list[str]]
    choice: dict[str, list[str]]

    def sets(self) -> Iterator[tuple[str, str, list[str]]]:
        """(domain, kind, texts) of each set that has any."""
        for domain in self.heldout:
            for kind in KINDS:
                if texts := getattr(self, kind)[domain]:
                    yield domain, kind, texts


@dataclasses.dataclass(frozen=True)
class SystemScore:
    """`nats[domain, kind]` per token of each text; `share[domain]` [L, E] of a routed model; operations per token."""

    nats: dict[tuple[str, str], Nats]
    share: dict[str, np.ndarray]
    forward_flops: float


def make_texts(config: StudyConfig, mix: pathlib.Path) -> Texts:
    """The same texts for every system and seed."""
    every = {name: [d.text for d in read_documents(mix / name, "heldout")] for name in (PUBLIC, *config.owners)}
    cut = {name: [text[: config.document_chars] for text in texts] for name, texts in every.items()}
    heldout = {name: _first(texts, config.heldout_bytes) for name, texts in cut.items()}
    choice = {name: make_items(texts, config.choice_items) for name, texts in every.items()}
    for pair in itertools.pairwise(config.owners):
        name = " + ".join(pair)
        documents = zip(*(_first(cut[part][::-1], config.heldout_bytes // 2) for part in pair), strict=False)
        heldout[name], choice[name] = [_interleave(*both) for both in documents], []
    return Texts(heldout, choice)


def score_seed(config: StudyConfig, artefacts: Artefacts, texts: Texts, home: pathlib.Path):
    """{system: SystemScore} of one seed; systems that are already scored are read from `home/scores`."""
    scores: dict[str, SystemScore] = {}
    for name, model in _models(config, artefacts).items():
        path = home / "scores" / f"{re.sub('[ /]', '_', name)}.npz"
        if not path.exists():
            _save(path, _score(model(), texts, uniform=name == "uniform mixing"))
            log.info(f"scored {name}")
        scores[name] = _load(path)
    frozen = {PUBLIC: scores["public"], **{owner: scores[f"frozen trunk {owner}"] for owner in config.owners}}
    dense = {PUBLIC: scores["public"], **{owner: scores[f"dense {owner}"] for owner in config.owners}}
    scores |= {"oracle dense expert": _oracle(dense), "oracle expert, frozen trunk": _oracle(frozen)}
    if config.systems == "method":
        return scores
    posteriors = _posteriors(config, artefacts, texts, home)
    path = home / "scores" / "weighted_soup.npz"
    if not path.exists():
        _save(path, _weighted_soup(config, artefacts, texts, posteriors))
    scores["weighted soup"] = _load(path)
    return scores | _mixtures(dense, posteriors)


def _models(config: StudyConfig, artefacts: Artefacts) -> dict[str, Callable[[], Model]]:
    """What makes each system that is one model."""
    merged = functools.lru_cache(maxsize=1)(lambda: load(artefacts.merged[METHOD]))
    public = functools.partial(load, artefacts.public)
    systems: dict[str, Callable[[], Model]] = {"public": public, METHOD: merged, "uniform mixing": merged}
    for owner in config.owners:
        systems[f"hybrid {owner}"] = functools.partial(_select, merged, [PUBLIC, owner])
        systems[f"without {owner}"] = functools.partial(_select, merged, {PUBLIC, *config.owners} - {owner})
    for n in range(2, len(config.owners) - 1):
        systems[f"first {n} owners"] = functools.partial(_select, merged, [PUBLIC, *config.owners[:n]])
    for name, change in _calibrations(len(config.owners)).items():
        systems[f"{METHOD}, {name}"] = functools.partial(_with_router, merged, *change)
    systems |= {f"dense {owner}": functools.partial(load, path) for owner, path in artefacts.dense.items()}
    systems |= {f"frozen trunk {owner}": functools.partial(load, path) for owner, path in artefacts.frozen.items()}
    if config.systems == "method":
        return systems
    for k in (1, 4):
        if k <= len(config.owners) + 1 and k != config.top_k:
            systems[f"{METHOD}, top-{k}"] = functools.partial(_with_top_k, merged, k)
    systems["soup"] = lambda: dataclasses.replace(public(), params=soup(_whole(artefacts)))
    systems |= {name: functools.partial(load, path) for name, path in artefacts.joint.items()}
    return systems | {n: functools.partial(load, path) for n, path in artefacts.merged.items() if n != METHOD}


def _select(model: Callable[[], Model], names) -> Model:
    return model().select(names)


def _with_top_k(model: Callable[[], Model], k: int) -> Model:
    return dataclasses.replace(model(), wanted_top_k=k)


def _calibrations(owners: int) -> dict[str, tuple[float, float]]:
    """{name: (factor of rows and biases, shift of owners' biases)}: what might keep the public expert's share.

    The odds of every pair {public, owner} stay as trained when owners join, so the public expert's share falls. A shift
    by log(owners) gives n experts together the odds that each of them had alone.
    """
    return {"shifted by log n": (1.0, -math.log(owners)), "rows x 2": (2.0, 0.0), "rows / 2": (0.5, 0.0)}


def _with_router(model: Callable[[], Model], factor: float, shift: float) -> Model:
    made = model()
    experts = {}
    for name, expert in made.params["experts"].items():
        bias = np.minimum(expert["bias"], 0) * factor + (0 if name == PUBLIC else shift)
        experts[name] = {**expert, "router": expert["router"] * np.float32(factor), "bias": bias.astype(np.float32)}
    return dataclasses.replace(made, params={**made.params, "experts": experts})


def _whole(artefacts: Artefacts) -> dict:
    """The parameters of the public model and of every dense expert."""
    return {name: load(path).params for name, path in {PUBLIC: artefacts.public, **artefacts.dense}.items()}


def _score(model: Model, texts: Texts, uniform: bool = False) -> SystemScore:
    nats, share = {}, {}
    for domain, kind, some in texts.sets():
        score = model.score(some, uniform=uniform)
        nats[domain, kind] = score.token_nats
        if kind == "heldout":
            share[domain] = score.share_LE
    active = len(model.experts) if uniform else model.top_k
    return SystemScore(nats, share, forward_flops(model.config, model.config.max_seq_len, active))


def _weighted_soup(config: StudyConfig, artefacts: Artefacts, texts: Texts, posteriors) -> SystemScore:
    """A soup for each set of texts, weighted by the classifier's mean posterior of its texts."""
    models, public, nats = _whole(artefacts), load(artefacts.public), {}
    for domain, kind, some in texts.sets():
        weights = dict(zip(models, posteriors[domain, kind].mean(0), strict=True))
        nats[domain, kind] = dataclasses.replace(public, params=soup(models, weights)).score(some).token_nats
    return SystemScore(nats, {}, forward_flops(config.model, config.model.max_seq_len))


def _mixtures(dense: dict[str, SystemScore], posteriors) -> dict[str, SystemScore]:
    """Baselines that are arithmetic on what the public model and the dense experts say."""
    names, one, sets = list(dense), dense[PUBLIC].forward_flops, dense[PUBLIC].nats

    def system(mix, active):
        by_set = {key: mix({name: score.nats[key] for name, score in dense.items()}, key) for key in sets}
        return SystemScore(by_set, {}, active * one)

    def routed(nats, key):
        return choose(nats, [names[i] for i in posteriors[key].argmax(1)])

    return {
        "BTM": system(lambda nats, key: branch_train_merge(nats), len(names)),
        "BTM, top-2": system(lambda nats, key: branch_train_merge(nats, top_k=2), len(names)),
        "causal BTM": system(lambda nats, key: causal_branch_train_merge(nats), len(names)),
        "causal BTM, top-2": system(lambda nats, key: causal_branch_train_merge(nats, top_k=2), len(names)),
        "prompt routing": system(routed, 1),
    }


def _oracle(experts: dict[str, SystemScore]) -> SystemScore:
    """For each set of texts the expert that says it best."""
    one, best = next(iter(experts.values())), {}
    for key in one.nats:
        total = {name: sum(doc.sum(dtype=np.float64) for doc in expert.nats[key]) for name, expert in experts.items()}
        best[key] = experts[min(total, key=total.__getitem__)].nats[key]
    return SystemScore(best, {}, one.forward_flops)


def _posteriors(config: StudyConfig, artefacts: Artefacts, texts: Texts, home: pathlib.Path):
    """{(domain, kind): [texts, experts]}: which expert's domain a sentence-embedding classifier sees in each text.

    Logistic regression on embeddings of training documents, the same for every seed; kept beside the mix.
    """
    from sklearn.linear_model import LogisticRegression

    from flexmoe_jax.data.embedding import embed_documents

    shared = home.parent  # never another study's: texts may differ
    path = shared / "posteriors.npz"
    if not path.exists():
        names = (PUBLIC, *config.owners)
        train = {n: _take(read_documents(shared / "mix" / n, "train"), config.classifier_documents) for n in names}
        labels = np.repeat(np.arange(len(names)), [len(some) for some in train.values()])
        classifier = LogisticRegression(max_iter=1000, C=10.0)
        classifier.fit(embed_documents([text for some in train.values() for text in some]), labels)
        arrays = {f"{d}/{kind}": classifier.predict_proba(embed_documents(some)) for d, kind, some in texts.sets()}
        np.savez(path, **arrays)  # type: ignore[arg-type]
    with np.load(path) as arrays:
        return {tuple(key.split("/")): arrays[key] for key in arrays}


def _take(documents, count: int) -> list[str]:
    return [document.text for document in itertools.islice(documents, count)]


def _first(texts: list[str], size: int) -> list[str]:
    """The first texts with at most `size` bytes together, but at least one."""
    if not texts:
        raise DataError("a domain has no held-out document", "build the mix again")
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: max(1, int(np.searchsorted(sizes, size, side="right")))]


def _interleave(a: str, b: str) -> str:
    pieces = [[text[at : at + PIECE] for at in range(0, len(text), PIECE)] for text in (a, b)]
    return "\n\n".join(piece for both in zip(*pieces, strict=False) for piece in both)


def _save(path: pathlib.Path, score: SystemScore) -> None:
    arrays = {"flops": np.array(score.forward_flops)}
    for (domain, kind), nats in score.nats.items():
        arrays[f"nats/{domain}/{kind}"] = np.concatenate(nats).astype(np.float32)
        arrays[f"lengths/{domain}/{kind}"] = np.array([len(doc) for doc in nats])
    arrays |= {f"share/{domain}": share for domain, share in score.share.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.rename(path)


def _load(path: pathlib.Path) -> SystemScore:
    nats, share = {}, {}
    with np.load(path) as arrays:
        for key in arrays:
            what, _, rest = key.partition("/")
            if what == "nats":
                lengths = arrays[f"lengths/{rest}"]
                domain, kind = rest.split("/")
                nats[domain, kind] = np.split(arrays[key], np.cumsum(lengths)[:-1])
            elif what == "share":
                share[rest] = arrays[key]
        return SystemScore(nats, share, float(arrays["flops"]))
