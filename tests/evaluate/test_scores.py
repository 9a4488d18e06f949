"""Scores run the experts that the model runs, are bits per UTF-8 byte, and belong to their documents."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import flexmoe_jax as fm
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.evaluate.perplexity import heldout_texts
from tests.tiny import TINY, jit_forward, random_params, stacked

CONFIG = dataclasses.replace(TINY, vocab_size=300, max_seq_len=64)
TEXTS = ["the king of the river", "é日本 👍", "a city and a year", "stone"]


@pytest.fixture(scope="module")
def model() -> fm.Model:
    return fm.Model(CONFIG, random_params(CONFIG, ("public", "code", "news")), load_tokenizer("cl100k:300"))


def nats_of(model: fm.Model, text: str, top_k: int) -> float:
    """Nats of a document by itself from the logits of a decoder with `top_k` active experts."""
    ids = np.array([model.tokenizer.eos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id])
    padded = np.pad(ids, (0, CONFIG.max_seq_len - len(ids)))[None]  # no token sees what follows it
    logits_TV = jit_forward(CONFIG, stacked(model.params), padded, top_k=top_k).logits_BTV[0, : len(ids) - 1]
    return float(-jax.nn.log_softmax(logits_TV)[np.arange(len(ids) - 1), ids[1:]].sum())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_score_runs_only_the_top_k_experts(model, top_k):
    """float32 sums of some twenty terms of order 6, in another batch shape."""
    chosen = dataclasses.replace(model, wanted_top_k=top_k)
    nats = [nats_of(model, text, top_k) for text in TEXTS]
    np.testing.assert_allclose(chosen.score(TEXTS).nats_D, nats, rtol=1e-5)
    others = [nats_of(model, text, top_k % 3 + 1) for text in TEXTS]
    assert not np.allclose(others, nats, rtol=1e-4)
    np.testing.assert_allclose(chosen.score(TEXTS).share_LE.sum(1), 1, rtol=1e-5)


def test_bits_are_per_byte_of_utf8_and_of_base_2(model):
    score = model.score(TEXTS)
    assert score.bytes_D.tolist() == [len(text.encode()) for text in TEXTS]
    assert score.bytes_D[1] == 13  # of six characters
    nats = sum(nats_of(model, text, 3) for text in TEXTS)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_a_score_of_a_document_does_not_depend_on_the_others(model):
    together = model.score(TEXTS)
    for text, nats, size in zip(TEXTS, together.token_nats, together.bytes_D, strict=True):
        alone = model.score([text])
        np.testing.assert_allclose(nats, alone.token_nats[0], rtol=1e-5)
        assert size == alone.bytes_D[0]


def test_held_out_text_ends_at_the_asked_bytes(tmp_path):
    texts = ["é" * 10, "b" * 20, "c" * 5]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert heldout_texts(tmp_path, 40) == texts[:2]
    assert heldout_texts(tmp_path, 39) == texts[:1]
    assert heldout_texts(tmp_path, 1) == texts[:1]  # at least one
    assert heldout_texts(tmp_path, 45) == texts
