"""Scores of long windows: the same numbers as of short ones where these suffice, in bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import flexmoe_jax as fm
from flexmoe_jax.data.pipeline import Batch, scoring_batches
from flexmoe_jax.data.tokenizer import load_tokenizer
from flexmoe_jax.evaluate.perplexity import _score_batch
from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.params import model_leaves
from flexmoe_jax.tree import unflatten
from tests.tiny import TINY, random_params

SMOLLM2 = ModelConfig(
    vocab_size=49_152,
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    max_seq_len=8192,
    pre_norm=True,
    qk_norm=False,
    tie_embeddings=True,
    norm_topk=True,
)


def test_the_score_of_a_document_does_not_depend_on_longer_windows():
    tokenizer = load_tokenizer("cl100k:300")
    config = dataclasses.replace(TINY, vocab_size=300, max_seq_len=4096)
    model = fm.Model(config, random_params(config, ("public", "news")), tokenizer)
    texts = ["the king of the river", "a" * 900, "one two " * 300, "three"]
    short, long = model.score(texts[:2] + texts[3:], seq_len=1024), model.score(texts, seq_len=4096)
    for ours, theirs in zip(short.token_nats, [long.token_nats[i] for i in (0, 1, 3)], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert long.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_a_window_of_8192_tokens_of_smollm2_fits_in_2_gb():
    """Of a process of 4 GB; the weights take 1.1 GB, as they are read and on the device."""
    texts = ["a" * 9000, *["b" * 100] * 20]
    tokenizer = load_tokenizer("cl100k:300")
    shapes = {b.tokens.shape for b, _, _ in scoring_batches(texts, tokenizer, 8192, 4096, batch_size=8)}
    assert shapes == {(1, 8192), (8, 1024)}
    params = unflatten({p: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for p, leaf in model_leaves(SMOLLM2).items()})
    one = params["experts"]["public"]
    stacked = {n: jax.ShapeDtypeStruct((one[n].shape[0], 1, *one[n].shape[1:]), jnp.float32) for n in one if "w_" in n}
    params["experts"] = {STACKED: stacked, "public": {name: one[name] for name in ("router", "bias")}}
    for shape in shapes:
        compiled = _score_batch.lower(Decoder(SMOLLM2, 1), params, Batch.shapes(*shape)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2e9
