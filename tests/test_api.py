"""The library: experts by name, exact selection, and generation and scores that agree with the logits."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.compose.merge import merge
from flexmoe_jax.errors import DataError, FlexMoEError
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model.generate import GREEDY, Sampling, generate, sample
from tests.tiny import WORDS, stacked

TOKENS = np.arange(40).reshape(2, 20) + 97


@pytest.fixture(scope="module")
def model(world) -> fm.Model:
    return fm.load(world / "model")


@pytest.mark.parametrize("kept", [("public",), ("public", "code"), ("public", "news"), ("code", "news"), ("news",)])
def test_a_selection_is_bit_identical_to_a_model_that_never_had_the_others(world, model, tmp_path, kept):
    never = fm.load(world / "model").select(kept)
    gone = [name for name in model.experts if name not in kept]
    assert np.array_equal(model.without(*gone).logits(TOKENS), never.logits(TOKENS))
    if "public" in kept:
        owners = [world / name / "run" / "package" for name in kept if name != "public"]
        merge(world / "public" / "run" / "model", owners, tmp_path / "never")
        assert np.array_equal(model.select(kept).logits(TOKENS), fm.load(tmp_path / "never").logits(TOKENS))


def test_an_expert_that_is_not_selected_cannot_reach_the_output(model):
    """Not even an expert full of NaN."""
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params["experts"]["news"])
    params = {**model.params, "experts": {**model.params["experts"], "news": broken}}
    poisoned = fm.Model(model.config, params, model.tokenizer)
    assert np.isnan(poisoned.logits(TOKENS)).any()
    assert np.array_equal(poisoned.without("news").logits(TOKENS), model.without("news").logits(TOKENS))


def test_top_k_is_clamped_to_the_experts_left(model):
    two = fm.Model(model.config, model.params, model.tokenizer, wanted_top_k=2)
    assert (two.top_k, two.without("news").top_k, two.select(["public"]).top_k) == (2, 2, 1)
    assert not np.array_equal(two.logits(TOKENS), model.logits(TOKENS))


def test_one_sequence_and_a_batch_of_it_agree(model):
    assert np.array_equal(model.logits(TOKENS[0]), model.logits(TOKENS[:1])[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "shape"),
        ([[0.5]], "float"),
        ([[[1]]], "shape"),
        (list(range(33)), r"33 tokens exceed the model's 32"),
        ([512], r"512.*512"),
        ([-1], "-1"),
    ],
)
def test_bad_tokens_are_refused(model, tokens, message):
    with pytest.raises(FlexMoEError, match=message):
        model.logits(tokens)


def test_unknown_experts_are_refused_with_a_hint(model):
    with pytest.raises(FlexMoEError, match="did you mean 'news'"):
        model.without("new")
    with pytest.raises(FlexMoEError, match="no expert is left"):
        model.without(*model.experts)


@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_greedy_generation_is_the_argmax_of_the_logits(model, dispatch):
    """Decoding with the cache equals one full forward pass per token; a batch of prompts equals each by itself."""
    prompts = [model.tokenizer.encode(text) for text in ("the king of", "a", "police said election vote")]
    params = stacked(model.params)
    common = {"max_new_tokens": 6, "stop_ids": [model.tokenizer.eos_id]}
    run = Decoder(model.config, dispatch=dispatch)
    together = generate(run, params, prompts, **common)
    for prompt, continued in zip(prompts, together, strict=True):
        assert generate(run, params, [prompt], **common) == [continued]
        row = list(prompt)
        for token in continued:
            assert token == int(np.argmax(model.logits(row)[-1]))
            row.append(token)
        assert len(continued) == 6 or int(np.argmax(model.logits(row)[-1])) == model.tokenizer.eos_id


def test_a_stop_token_ends_the_row_before_it(model):
    params = stacked(model.params)
    prompts = [model.tokenizer.encode("the king of"), model.tokenizer.encode("a")]
    common = {"max_new_tokens": 6, "sampling": Sampling(1.0), "seed": 3}
    free = generate(Decoder(model.config), params, prompts, stop_ids=(), **common)
    assert [len(row) for row in free] == [6, 6]
    stop = free[0][2]
    stopped = generate(Decoder(model.config), params, prompts, stop_ids=[stop], **common)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 2


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(model):
    text = "naïve 日本 end"
    pieces = [piece for piece in model.tokenizer.pieces(model.tokenizer.encode(text)) if piece]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    cut = model.tokenizer.encode("日")[:-1]  # an incomplete last character is shown, not lost
    assert "".join(model.tokenizer.pieces(cut)) == model.tokenizer.decode(cut)


def test_text_of_a_selection_is_that_of_a_model_without_the_others(model):
    """With an expert of NaN beside it: what is not selected cannot reach the text."""
    names = [name for name in model.experts if name != "news"]
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params["experts"]["news"])
    poisoned = dataclasses.replace(
        model, params={**model.params, "experts": {**model.params["experts"], "news": broken}}
    )
    expected = model.without("news").generate("the", max_new_tokens=8)
    assert poisoned.generate("the", experts=names, max_new_tokens=8) == expected
    assert poisoned.generate("the", max_new_tokens=8) != expected


def test_the_seed_determines_sampled_text(model):
    draws = [model.generate("the", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_top_k_and_top_p_keep_only_the_likeliest_tokens():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))

    def drawn(sampling):
        keys = jax.random.split(jax.random.key(0), 400)
        return set(np.asarray(jax.vmap(lambda key: sample(key, logits, sampling))(keys)).ravel().tolist())

    assert drawn(GREEDY) == {0}
    assert drawn(Sampling(1.0)) == {0, 1, 2, 3}
    assert drawn(Sampling(1.0, top_k=2)) == {0, 1}
    assert drawn(Sampling(1.0, top_p=0.7)) == {0, 1}  # 0.5 is less than 0.7, so the next token belongs to it
    assert drawn(Sampling(1.0, top_p=0.4)) == {0}
    assert drawn(Sampling(1.0, top_k=3, top_p=0.99)) == {0, 1, 2}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(FlexMoEError):
        Sampling(**bad)


def test_a_generation_longer_than_the_model_is_refused(model):
    with pytest.raises(FlexMoEError, match="exceed the model's 32"):
        model.generate("the", max_new_tokens=32)


def test_windows_longer_than_the_model_are_not_scored(model):
    longest = model.config.max_seq_len
    with pytest.raises(DataError, match=f"windows of {longest + 1} tokens .* max_seq_len is {longest}") as refusal:
        model.score(["the king"], seq_len=longest + 1)
    assert refusal.value.remedy == f"score in windows (--seq-len) of at most {longest}"
    assert model.score(["the king"], seq_len=longest).tokens == model.score(["the king"]).tokens


def test_score_is_the_log_likelihood_of_the_documents(model):
    """The reference: logits of each document by itself after an end-of-text token. One document fits in one window."""
    texts = [" ".join(WORDS["news"][:3]), " ".join(WORDS["public"][:4])]
    score = model.score(texts, seq_len=32, stride=16)
    nats = []
    for text in texts:
        ids = [model.tokenizer.eos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id]
        log_p = jax.nn.log_softmax(model.logits(ids[:-1]), axis=-1)
        nats.append(-sum(float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1)))
    # float32 sums of about ten terms of order 5, in another batch shape
    np.testing.assert_allclose(score.nats_D, nats, rtol=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5)
    np.testing.assert_allclose(score.share_LE.sum(axis=1), 1, rtol=1e-5)


def test_uniform_weights_ignore_the_router(model):
    score = model.score(["the king of the river"], uniform=True)
    np.testing.assert_allclose(score.share_LE, 1 / 3, rtol=1e-6)
    moved = jax.tree.map(lambda leaf: leaf, model.params)
    news = {**moved["experts"]["news"], "router": moved["experts"]["news"]["router"] + 5}
    other = fm.Model(model.config, {**moved, "experts": {**moved["experts"], "news": news}}, model.tokenizer)
    texts = ["the king of the river"]
    assert other.score(texts, uniform=True).nats_D == score.nats_D
    assert other.score(texts).nats_D != model.score(texts).nats_D
