"""Averages of models of one shape: soups, and the start of BTX."""

from collections.abc import Mapping

import jax
import numpy as np

from flexmoe_jax.tree import PUBLIC, TRUNK, Params, union


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
