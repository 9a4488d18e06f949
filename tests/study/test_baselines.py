"""Mixtures of models equal sums written out, and the causal one does not see the future."""

import math

import numpy as np
import pytest

from flexmoe_jax.study.baselines import branch_train_merge, causal_branch_train_merge, choose, oracle

A, B = np.array([0.5, 2.0, 1.0]), np.array([1.5, 0.25, 3.0])
NATS = {"a": [A], "b": [B]}


def test_btm_is_the_mixture_with_its_weights():
    temperature = 0.7
    scores = [math.exp(-A.mean() / temperature), math.exp(-B.mean() / temperature)]
    weights = [score / sum(scores) for score in scores]
    expected = [-math.log(weights[0] * math.exp(-a) + weights[1] * math.exp(-b)) for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(branch_train_merge(NATS, temperature)[0], expected, rtol=1e-12)


def test_causal_btm_is_the_posterior_mixture_whose_total_is_the_mean_likelihood():
    """Bayes: the product of the mixtures over tokens is the average of the experts' products, exactly."""
    mixed = causal_branch_train_merge(NATS)[0]
    total = -math.log((math.exp(-A.sum()) + math.exp(-B.sum())) / 2)
    assert mixed.sum() == pytest.approx(total, rel=1e-12)


def test_a_posterior_that_forgets_is_the_next_prior_to_that_power():
    """Token by token, as the definition says: w(t + 1) is in proportion to (w(t) p(t))^forgetting."""
    expected, prior_E = [], np.array([0.5, 0.5])
    for a, b in zip(A, B, strict=True):
        p_E = np.exp([-a, -b])
        expected.append(-math.log(prior_E @ p_E))
        prior_E = (prior_E * p_E) ** 0.8
        prior_E /= prior_E.sum()
    np.testing.assert_allclose(causal_branch_train_merge(NATS, 0.8)[0], expected, rtol=1e-12)


def test_a_mixture_that_forgets_follows_a_document_that_changes_hands():
    """Two hundred tokens of which each model knows a half: what never forgets pays the whole first half back."""
    known, unknown = np.full(100, 1.0), np.full(100, 3.0)
    nats = {"a": [np.concatenate([known, unknown])], "b": [np.concatenate([unknown, known])]}
    assert causal_branch_train_merge(nats, 1.0)[0].sum() == pytest.approx(400, rel=0.01)  # one model, all the way
    assert causal_branch_train_merge(nats, 0.8)[0].sum() < 215


def test_causal_btm_does_not_look_ahead_and_the_papers_form_does():
    later = {"a": [np.array([0.5, 2.0, 9.0])], "b": [np.array([1.5, 0.25, 0.1])]}
    np.testing.assert_array_equal(causal_branch_train_merge(later)[0][:2], causal_branch_train_merge(NATS)[0][:2])
    assert branch_train_merge(later)[0][0] != branch_train_merge(NATS)[0][0]


@pytest.mark.parametrize("mix", [branch_train_merge, causal_branch_train_merge])
def test_top_1_is_one_expert_and_top_2_of_two_is_the_whole_mixture(mix):
    single = mix(NATS, top_k=1)[0]
    assert all(min(abs(s - a), abs(s - b)) < 1e-12 for s, a, b in zip(single, A, B, strict=True))
    np.testing.assert_array_equal(mix(NATS, top_k=2)[0], mix(NATS)[0])


def test_prompt_routing_takes_each_document_from_its_expert():
    nats = {"a": [A, A], "b": [B, B]}
    chosen = choose(nats, ["b", "a"])
    assert chosen[0] is B
    assert chosen[1] is A


def test_the_oracle_takes_all_documents_from_the_expert_with_the_lowest_total():
    nats = {"a": [A, A], "b": [B, A - 0.3]}
    assert oracle(nats) is nats["a"]  # 7.0 against 7.35
    assert oracle({**nats, "b": [B, A - 0.5]})[1][0] == 0.0
