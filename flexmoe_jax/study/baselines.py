"""Baselines that combine whole models: mixtures of what they predict (BTM, prompt routing, the oracle), soups, BTX.

Every model scores every document once. The mixtures are then arithmetic on `nats[model][document]`, float [T], the
negative log-likelihoods of the document's T tokens.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from scipy.special import log_softmax, logsumexp

from flexmoe_jax.tree import PUBLIC, TRUNK, Params, union

Nats = list[np.ndarray]

FORGETTING = (1.0, 0.99, 0.95, 0.9, 0.8, 0.6)  # factors from which causal BTM's is chosen


def branch_train_merge(nats: Mapping[str, Nats], temperature: float = 0.1, top_k: int | None = None) -> Nats:
    """BTM as the paper runs it: p(t) = sum_i w_i p_i(t) with w = softmax(-L_i / temperature) -> nats per token.

    L_i is model i's mean loss on the document that is scored, so the weights have seen the tokens they predict (paper
    section 4.2; Li et al., Branch-Train-Merge, arXiv 2208.03306). `top_k` keeps the k largest weights.
    """
    return [_mix(doc_ET, _log_weights(-doc_ET.mean(1) / temperature, top_k)[:, None]) for doc_ET in _documents(nats)]


def causal_branch_train_merge(nats: Mapping[str, Nats], forgetting: float = 1.0, top_k: int | None = None) -> Nats:
    """BTM with weights from the past only: those of token t are the models' posterior given the tokens before it.

    w_i(t) is proportional to the product of p_i(s)^(forgetting^(t - s)) over s < t, with equal weights for the first
    token: the posterior after a token, to the power `forgetting`, is the prior of the next (Raftery et al., Online
    Prediction Under Model Uncertainty via Dynamic Model Averaging, Technometrics, 2010). With 1 nothing is forgotten,
    and one model wins a long document for good. This mixture is a language model; the paper's is not.
    """
    mixed = []
    for doc_ET in _documents(nats):
        past_ET = lfilter([0.0, forgetting], [1.0, -forgetting], doc_ET, axis=1)
        mixed.append(_mix(doc_ET, _log_weights(-past_ET, top_k)))
    return mixed


def choose(nats: Mapping[str, Nats], names: list[str]) -> Nats:
    """Document d as the model `names[d]` scores it: prompt routing, where a classifier names the models."""
    return [nats[name][d] for d, name in enumerate(names)]


def oracle(nats: Mapping[str, Nats]) -> Nats:
    """All documents as the model with the lowest total scores them."""
    totals = {name: sum(doc.sum(dtype=np.float64) for doc in docs) for name, docs in nats.items()}
    return nats[min(totals, key=totals.__getitem__)]


def soup(models: Mapping[str, Params], weights: Mapping[str, float] | None = None) -> Params:
    """The weighted mean of the parameters of whole models (named form), float32. Weights are normalized to sum to one.

    Wortsman et al., Model soups, arXiv 2203.05482; paper section 4.2. Equal weights by default.
    """
    names = list(models)
    shares = np.array([1.0 if weights is None else weights[name] for name in names], np.float64)
    shares /= shares.sum()

    def mean(*leaves: npt.ArrayLike) -> np.ndarray:
        total = sum(share * np.asarray(leaf, np.float64) for share, leaf in zip(shares, leaves, strict=True))
        return np.asarray(total, np.float32)

    return jax.tree.map(mean, *(models[name] for name in names))


def branch_train_mix(models: Mapping[str, Params]) -> Params:
    """BTX before its joint training: each dense model's feed-forward network an expert, everything else averaged.

    `models` has the public model under `public` and each owner's, trained from it as a whole, under the owner's name.
    Router rows are those of the models, biases 0. Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816.
    """
    experts = {name: params["experts"][PUBLIC] for name, params in models.items()}
    zero = {name: expert | {"bias": np.zeros_like(expert["bias"])} for name, expert in experts.items()}
    trunk = soup({name: {TRUNK: params[TRUNK]} for name, params in models.items()})[TRUNK]
    return union({TRUNK: trunk}, zero)


def _documents(nats: Mapping[str, Nats]) -> Iterator[np.ndarray]:
    """float64 [E, T] of each document, models in the order of the mapping."""
    for rows in zip(*nats.values(), strict=True):
        yield np.stack(rows).astype(np.float64)


def _log_weights(scores_E_: np.ndarray, top_k: int | None) -> np.ndarray:
    """log-softmax over axis 0, of the `top_k` largest only where given; of equal scores the first is kept."""
    if top_k is not None:
        rank = np.argsort(np.argsort(-scores_E_, axis=0, kind="stable"), axis=0, kind="stable")
        scores_E_ = np.where(rank < top_k, scores_E_, -np.inf)
    return log_softmax(scores_E_, axis=0)


def _mix(doc_ET: np.ndarray, log_weights_E_: np.ndarray) -> np.ndarray:
    return -logsumexp(log_weights_E_ - doc_ET, axis=0)
