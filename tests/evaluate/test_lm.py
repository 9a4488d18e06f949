"""Log-likelihoods equal those of the logits in any batching; texts equal greedy generation."""

import jax
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.errors import FlexMoEError
from flexmoe_jax.evaluate.lm import cut
from flexmoe_jax.model.decoder import Decoder
from tests.hf.tiny import our_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> fm.Model:
    folder = tmp_path_factory.mktemp("ours")
    our_model(folder, biased=True, top_k=2)
    return fm.load(folder / "model")


def logits_of(model, ids):
    """float32 [tokens, V], computed with right padding, so that only one shape is compiled."""
    return np.asarray(model.logits(ids + [0] * (model.config.max_seq_len - len(ids))))[: len(ids)]


def by_hand(model, context, continuation):
    whole = [*context, *continuation]
    whole = whole[-(model.config.max_seq_len + 1) :]
    log_p = np.asarray(jax.nn.log_softmax(logits_of(model, whole[:-1]), axis=-1))[-len(continuation) :]
    greedy = bool((log_p.argmax(-1) == continuation).all())
    return float(log_p[np.arange(len(continuation)), continuation].sum()), greedy


def requests(model):
    """Pairs with own and shared contexts, of one token and many, a context that is too long, and greedy answers."""
    rng = np.random.default_rng(0)

    def ids(n):
        return rng.integers(0, 300, n).tolist()

    shared, long = ids(9), ids(70)
    pairs = [(ids(3), ids(4)), (ids(1), ids(1)), (ids(30), ids(20)), (long, ids(5)), (ids(60), ids(5))]
    pairs += [(shared, ids(n)) for n in (1, 1, 3, 7)] + [(long, ids(2)), (ids(1), ids(40))]
    for context in (ids(5), shared):
        greedy = []
        for _ in range(3):
            greedy.append(int(np.argmax(logits_of(model, context + greedy)[-1])))
        pairs += [(context, greedy), (context, [*greedy[:-1], (greedy[-1] + 1) % 300])]
    return pairs


@pytest.mark.parametrize(("batch_size", "experts"), [(1, None), (3, None), (3, ("public", "news"))])
def test_loglikelihoods_equal_those_of_the_logits(model, batch_size, experts):
    chosen = model if experts is None else model.select(experts)
    pairs = requests(chosen)
    found = chosen.lm(batch_size).loglikelihoods(pairs)
    expected = [by_hand(chosen, *pair) for pair in pairs]
    # Sums of up to forty float32 log-probabilities of order 6; attention with the cache sums in another order.
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=2e-4)
    assert [g for _, g in found] == [g for _, g in expected]
    assert {True, False} == {g for _, g in expected}


def test_leaving_out_an_expert_changes_the_loglikelihoods(model):
    pairs = requests(model)[:1]
    assert model.lm(3).loglikelihoods(pairs) != model.without("code").lm(3).loglikelihoods(pairs)


def test_pairs_are_split_where_the_context_ends(model):
    lm = model.lm()
    encode = model.tokenizer.encode
    assert lm.encode_pair("The owner", " agreed") == (
        encode("The owner"),
        encode("The owner agreed")[len(encode("The owner")) :],
    )
    assert lm.encode_pair("The owner ", "agreed") == lm.encode_pair("The owner", " agreed")
    assert lm.encode_pair("", " agreed") == ([model.tokenizer.eos_id], encode(" agreed"))


def test_text_ends_at_a_stop_string_or_the_length(model):
    lm = model.lm(2)
    prompts = ["the king", "a", "12 owners agreed to"]
    free = lm.continue_until(prompts, [], 12)
    for prompt, text in zip(prompts, free, strict=True):
        assert text == model.generate(prompt, max_new_tokens=12)
    stops = [free[0][3:5], free[2][6:8]]
    assert lm.continue_until(prompts, stops, 12) == [cut(text, stops) for text in free]
    assert len(cut(free[0], stops)) <= 3


def test_a_long_prompt_keeps_its_end(model):
    text = " ".join(map(str, range(100)))
    ids = model.tokenizer.encode(text)[-(64 - 8) :]
    expected = fm.api.stream(
        Decoder(model.config, 2, "sparse"),
        model._stacked,
        [ids],
        max_new_tokens=8,
        stop_ids={model.tokenizer.eos_id},
    )
    assert model.lm(1).continue_until([text], [], 8) == [
        model.tokenizer.decode([t for s in expected for t in s.values()])
    ]
    with pytest.raises(FlexMoEError, match="64 new tokens leave no room"):
        model.lm(1).continue_until([text], [], 64)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * 65)])
def test_empty_and_too_long_requests_are_refused(model, pair):
    with pytest.raises(FlexMoEError, match="request 0"):
        model.lm().loglikelihoods([pair])
