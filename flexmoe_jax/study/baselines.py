"""Mixtures of whole models by what each says of the same tokens: BTM, prompt routing, the oracle.

Every model scores every document once; the baselines that mix or choose among dense experts are then arithmetic on
`nats[expert][document]`, float [T], negative log-likelihoods of the document's T tokens.
"""

from collections.abc import Mapping

import jax
import numpy as np
from scipy.special import log_softmax, logsumexp

from flexmoe_jax.tree import PUBLIC, TRUNK, Params, union

Nats = list[np.ndarray]


def branch_train_merge(nats: dict[str, Nats], temperature: float = 0.1, top_k: int | None = None) -> Nats:
    """BTM as the paper runs it: p(t) = sum_i w_i p_i(t) with w = softmax(-L_i / temperature) -> nats per token.

    L_i is expert i's mean loss on the very document that is scored, so the weights have seen the tokens they predict
    (paper section 4.2; Li et al., Branch-Train-Merge, arXiv 2208.03306). `top_k` keeps the k largest weights.
    """
    return [_mix(doc_ET, _kept(-doc_ET.mean(1) / temperature, top_k)[:, None]) for doc_ET in _documents(nats)]


def causal_branch_train_merge(nats: dict[str, Nats], top_k: int | None = None) -> Nats:
    """BTM with weights from the past alone: token t's are the experts' posterior given the tokens before it.

    w_i(t) is proportional to the product of p_i(s) over s < t, with equal weights before the first token. This is a
    language model; the paper's form is not.
    """
    mixed = []
    for doc_ET in _documents(nats):
        past_ET = np.cumsum(doc_ET, axis=1) - doc_ET
        mixed.append(_mix(doc_ET, _kept(-past_ET, top_k)))
    return mixed


def choose(nats: dict[str, Nats], names: list[str]) -> Nats:
    """Document d as the expert `names[d]` scores it: prompt routing, where a classifier names it."""
    return [nats[name][d] for d, name in enumerate(names)]


def _documents(nats: dict[str, Nats]):
    """float64 [E, T] of each document, experts in the order of the mapping."""
    for rows in zip(*nats.values(), strict=True):
        yield np.stack(rows).astype(np.float64)


def _kept(scores_E_, top_k: int | None):
    """Log-weights over axis 0, of the `top_k` largest alone where given; equal scores are won by the first."""
    if top_k is not None:
        rank = np.argsort(np.argsort(-scores_E_, axis=0, kind="stable"), axis=0, kind="stable")
        scores_E_ = np.where(rank < top_k, scores_E_, -np.inf)
    return log_softmax(scores_E_, axis=0)


def _mix(doc_ET, log_weights_E_):
    return -logsumexp(log_weights_E_ - doc_ET, axis=0)


def soup(models: Mapping[str, Params], weights: Mapping[str, float] | None = None) -> Params:
    """The weighted mean of the parameters of whole models (named form), float32; weights are normalised to sum to one.

    Wortsman et al., Model soups, arXiv 2203.05482; the paper's section 4.2. Equal weights by default.
    """
    names = list(models)
    shares = np.array([1.0 if weights is None else weights[name] for name in names], np.float64)
    shares /= shares.sum()

    def mean(*leaves):
        total = sum(share * np.asarray(leaf, np.float64) for share, leaf in zip(shares, leaves, strict=True))
        return np.asarray(total, np.float32)

    return jax.tree.map(mean, *(models[name] for name in names))


def branch_train_mix(models: Mapping[str, Params]) -> Params:
    """BTX before its joint training: each dense model's feed-forward network an expert, everything else averaged.

    `models` has the public model under `public` and each owner's, trained from it as a whole, under the owner's name.
    Router rows are those of the experts' own trees, biases 0. Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816.
    """
    experts = {name: params["experts"][PUBLIC] for name, params in models.items()}
    zero = {name: expert | {"bias": np.zeros_like(expert["bias"])} for name, expert in experts.items()}
    trunk = soup({name: {TRUNK: params[TRUNK]} for name, params in models.items()})[TRUNK]
    return union({TRUNK: trunk}, zero)
