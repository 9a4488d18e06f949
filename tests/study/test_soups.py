"""Soups and the start of BTX are right leaf by leaf."""

import numpy as np

from flexmoe_jax.study.baselines import branch_train_mix, soup
from flexmoe_jax.tree import PUBLIC, flatten
from tests.tiny import TINY, random_params


def models():
    return {name: random_params(TINY, seed=n) for n, name in enumerate((PUBLIC, "code", "news"))}


def test_a_soup_is_the_weighted_mean_of_every_leaf():
    parts = models()
    weights = {PUBLIC: 2.0, "code": 1.0, "news": 1.0}
    made = flatten(soup(parts, weights))
    for path, leaf in made.items():
        a, b, c = (np.asarray(flatten(parts[name])[path], np.float64) for name in parts)
        np.testing.assert_allclose(leaf, (2 * a + b + c) / 4, rtol=1e-6, atol=1e-7)  # one rounding to float32


def test_a_soup_of_one_model_is_that_model():
    one, other = random_params(TINY), random_params(TINY, seed=1)
    for path, leaf in flatten(soup({"only": one, "none": other}, {"only": 3, "none": 0})).items():
        assert np.array_equal(leaf, flatten(one)[path]), path


def test_btx_keeps_feed_forward_networks_and_averages_the_rest():
    parts = models()
    made = branch_train_mix(parts)
    assert set(made["experts"]) == {PUBLIC, "code", "news"}
    for name, params in parts.items():
        for leaf in ("w_gate", "w_up", "w_down"):
            assert np.array_equal(made["experts"][name][leaf], params["experts"][PUBLIC][leaf])
        assert not made["experts"][name]["bias"].any()
    mean = np.mean([np.asarray(p["trunk"]["embed"], np.float64) for p in parts.values()], axis=0)
    np.testing.assert_allclose(made["trunk"]["embed"], mean, rtol=1e-6, atol=1e-7)
