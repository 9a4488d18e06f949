"""The routing of a text: pieces join to the text, and weights are the router's."""

import numpy as np
import pytest

from flexmoe_jax import load
from flexmoe_jax.errors import DataError


@pytest.fixture(scope="module")
def model(world):
    return load(world / "model")


@pytest.mark.parametrize("text", ["the king said: for range", "naïve 東京 🌊", "x"])
def test_pieces_join_to_the_text_and_weights_sum_to_one(model, text):
    routing = model.routing(text)
    assert "".join(routing.pieces) == text
    layers, tokens, experts = routing.weights_LTE.shape
    assert (layers, tokens, experts) == (model.config.num_layers, len(routing.pieces), 3)
    np.testing.assert_allclose(routing.weights_LTE.sum(-1), 1, atol=1e-6)  # float32 sums of three


def test_the_mean_weights_of_a_text_equal_the_shares_of_its_score(model):
    """Except for one position: scoring also counts the end-of-text token."""
    text = "police said the market"
    routing = model.routing(text)
    score = model.score([text])
    T = len(routing.pieces)
    assert score.tokens == T + 1
    with_first = score.share_LE * (T + 1) - routing.weights_LTE.sum(1)
    np.testing.assert_allclose(with_first.sum(-1), 1, atol=1e-4)
    assert (with_first > -1e-4).all()


def test_a_tokens_weights_are_those_of_the_position_that_reads_it(model):
    """Only the last token differs, so only its weights differ."""
    one, other = (model.routing(f"police said the {last}").weights_LTE for last in ("a", "b"))
    assert one.shape == other.shape
    np.testing.assert_array_equal(one[:, :-1], other[:, :-1])
    assert (one[:, -1] != other[:, -1]).any()


def test_experts_outside_the_top_k_have_weight_zero(world):
    import dataclasses

    routing = dataclasses.replace(load(world / "model"), wanted_top_k=1).routing("the election for the city")
    np.testing.assert_allclose(
        np.sort(routing.weights_LTE, axis=-1), np.broadcast_to([0, 0, 1], routing.weights_LTE.shape)
    )


def test_no_text_is_refused(model):
    with pytest.raises(DataError, match="no token"):
        model.routing("")
