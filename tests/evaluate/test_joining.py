"""Gain and regret: their signs, and intervals over documents that mean what they say."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

import flexmoe_jax as fm
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.evaluate.joining import Joining, difference
from flexmoe_jax.evaluate.perplexity import Score
from tests.tiny import TINY, WORDS, random_params

TEXTS = ["the king of the river", "é日本 👍", "a city and a year", "stone"]
BYTES = np.array([40, 200, 90, 1000])


def score(bits_D, bytes_D=BYTES) -> Score:
    """A score of documents that take `bits_D`, each of one token."""
    return Score([np.array([bits * np.log(2)]) for bits in bits_D], np.asarray(bytes_D), np.ones((1, 1)))


def test_a_hybrid_that_is_better_than_the_merged_model_is_a_regret_and_a_worse_public_model_a_gain():
    joined = Joining(public=score(2.5 * BYTES), hybrid=score(2.0 * BYTES), merged=score(2.2 * BYTES))
    assert joined.gain.value == pytest.approx(0.3)
    assert joined.regret.value == pytest.approx(0.2)
    assert not joined.gain.includes_zero
    lost = Joining(public=score(2.0 * BYTES), hybrid=score(2.2 * BYTES), merged=score(2.1 * BYTES))
    assert (lost.gain.value, lost.regret.value) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert lost.describe()["regret"]["value"] == lost.regret.value


@pytest.fixture(scope="module")
def model() -> fm.Model:
    config = dataclasses.replace(TINY, vocab_size=300, max_seq_len=64)
    params = random_params(config, ("public", "math", "news"))
    return fm.Model(config, params, load_tokenizer("cl100k:300"), wanted_top_k=2)


def test_the_scores_are_those_of_public_alone_the_own_hybrid_and_the_merged_model(model):
    joined = model.joining({"news": TEXTS, "public": TEXTS[:2]}, seq_len=32)
    assert list(joined) == ["public", "news"]
    for name, texts, hybrid in (("news", TEXTS, ["public", "news"]), ("public", TEXTS[:2], ["public"])):
        expected = Joining(*(model.select(e).score(texts, seq_len=32) for e in (["public"], hybrid, model.experts)))
        assert joined[name].describe() == expected.describe()
    assert joined["public"].regret.value == -joined["public"].gain.value


@pytest.mark.parametrize("better", [True, False])
def test_text_that_the_own_hybrid_predicts_better_is_regretted(model, better):
    words = [word for text in WORDS.values() for word in text]
    hybrid, merged = (model.select(names).score(words).nats_D for names in (["public", "news"], model.experts))
    texts = [word for word, a, b in zip(words, hybrid, merged, strict=True) if bool(a < b) is better]
    assert texts
    assert (model.joining({"news": texts})["news"].regret.value > 0) is better
    assert model.without("math").joining({"news": texts})["news"].regret.value == 0


def test_no_copy_of_the_weights_stays_on_the_device(model):
    fresh = dataclasses.replace(model)
    fresh.joining({"news": TEXTS})
    assert "_stacked" not in vars(fresh)


@pytest.mark.parametrize(
    ("texts", "what"), [({"nwes": TEXTS}, "did you mean 'news'"), ({}, "no expert is left"), ({"news": []}, "no docum")]
)
def test_unknown_owners_and_missing_text_are_refused(model, texts, what):
    with pytest.raises(FlexMoEError, match=what):
        model.joining(texts)
    with pytest.raises(FlexMoEError, match="no expert 'public'"):
        model.select(["news", "math"]).joining({"news": TEXTS})


def test_of_equal_documents_the_interval_is_the_paired_t_interval():
    a, b = np.random.default_rng(0).normal(50, 5, (2, 9))
    found = difference(score(a, [25] * 9), score(b, [25] * 9))
    expected = stats.ttest_rel(a / 25, b / 25)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose([found.value - found.half_width, found.value + found.half_width], [low, high])
    assert found.includes_zero == (expected.pvalue > 0.05)


def test_documents_of_one_rate_leave_no_doubt_whatever_their_lengths():
    found = difference(score(2.5 * BYTES), score(2.2 * BYTES))
    assert found.half_width < 1e-12
    assert not found.includes_zero


def test_a_difference_within_its_interval_and_one_of_a_single_document_are_not_told_from_zero():
    mixed = difference(score([10, 20, 30, 40], [10] * 4), score([11, 18, 33, 37], [10] * 4))
    assert 0 < mixed.value < mixed.half_width
    assert mixed.includes_zero
    single = difference(score([10], [5]), score([5], [5]))
    assert (single.value, single.half_width, single.includes_zero) == (1.0, None, True)
    assert difference(score([np.nan, 1], [5, 5]), score([1, 1], [5, 5])).includes_zero  # of a broken model


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 draws of 20 documents of unequal length: a binomial error of 0.5%; linearizing the ratio costs 1 to 3%."""
    rng, truth, covered = np.random.default_rng(0), 0.1, 0
    for _ in range(2000):
        sizes = rng.integers(50, 1000, 20)
        bits = sizes * rng.normal(truth, 0.2, 20)
        found = difference(score(bits, sizes), score(0 * bits, sizes))
        covered += abs(found.value - truth) <= found.half_width
    assert 0.92 <= covered / 2000 <= 0.965
