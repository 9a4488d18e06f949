"""Attention: causality and separation of packed documents, proved by gradients; grouped heads; the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from flexmoe_jax.model import attention
from flexmoe_jax.model.cache import init_cache
from flexmoe_jax.model.decoder import Decoder, forward
from flexmoe_jax.model.rope import apply_rope, rope_table
from flexmoe_jax.model_config import ModelConfig
from tests.tiny import TINY, jit_decode, jit_forward, max_difference, random_params, random_tokens, stacked

LLAMA = dataclasses.replace(TINY, pre_norm=True, norm_topk=True, qk_norm=False)
EXPERTS = ("public", "code", "news")
LENGTH = 12


def influence(config: ModelConfig, segments=None, **how):
    """[T, T]: the largest |d logits[t] / d embedding of the token at t'|, for a random combination of the logits."""
    params = random_params(config, EXPERTS)
    if how.get("dispatch") == "sparse":
        params = stacked(params)
    tokens = jnp.arange(LENGTH)[None]  # all different: row t' of the embedding is the input only at t'
    mix = jnp.asarray(np.random.default_rng(0).standard_normal(config.vocab_size), jnp.float32)

    @jax.jit
    @jax.jacrev
    def jacobian(embed):
        tree = {**params, "trunk": {**params["trunk"], "embed": embed}}
        return forward(Decoder(config, **how), tree, tokens, segments_BT=segments).logits_BTV[0] @ mix

    return np.abs(np.asarray(jacobian(params["trunk"]["embed"])))[:, :LENGTH].max(-1)


@pytest.mark.parametrize(
    ("config", "how"),
    [(TINY, {"top_k": 2}), (TINY, {"top_k": 2, "dispatch": "sparse"}), (LLAMA, {"uniform": True, "remat": True})],
    ids=["dense", "sparse", "llama-uniform-remat"],
)
def test_logits_depend_on_every_earlier_token_and_on_no_later_one(config, how):
    reach = influence(config, **how)
    sees = np.tril(np.ones((LENGTH, LENGTH), bool))
    assert np.array_equal(reach > 0, sees)  # exactly 0 after t, and every token up to t matters


def test_packed_documents_cannot_see_each_other():
    """Documents of 5, 1 and 6 tokens in one row; their numbers need not be ascending."""
    segments = jnp.asarray([[3] * 5 + [9] + [1] * 6], jnp.int32)
    reach = influence(TINY, segments, top_k=2)
    sees = np.tril(np.asarray(segments[0])[:, None] == np.asarray(segments[0])[None])
    assert np.array_equal(reach > 0, sees)


def test_a_packed_document_gives_the_logits_of_the_document_by_itself():
    params, tokens = random_params(TINY, EXPERTS), random_tokens(TINY, 2, LENGTH)
    segments = jnp.asarray([[0] * 6 + [1] * 6, [0] * 12], jnp.int32)
    packed = jit_forward(TINY, params, tokens, segments_BT=segments, top_k=2).logits_BTV
    alone = jit_forward(TINY, params, tokens[:1, 6:], top_k=2).logits_BTV
    # Positions continue through the row and RoPE is relative, so only rounding differs: angles up to 12 in float32 are
    # off by 1e-6, and so are attention scores of order 1 (measured 1e-6).
    assert max_difference(packed[:1, 6:], alone) < 1e-5
    first = jit_forward(TINY, params, tokens[:1, :6], top_k=2).logits_BTV
    assert max_difference(packed[:1, :6], first) < 1e-5
    # Without the mask the second document's logits differ: the comparison above can fail.
    assert max_difference(jit_forward(TINY, params, tokens, top_k=2).logits_BTV[:1, 6:], alone) > 0.1


def test_shifted_positions_give_the_same_logits():
    """All positions shifted by a constant: the same logits (angles up to 40 round by 4e-6)."""
    params, tokens = random_params(TINY), random_tokens(TINY, 2, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    run = functools.partial(jit_forward, TINY, params, tokens)
    assert max_difference(run(positions_BT=positions + 29).logits_BTV, run(positions_BT=positions).logits_BTV) < 5e-5
    # Spacing matters: stretched positions give other logits.
    assert max_difference(run(positions_BT=positions * 2).logits_BTV, run(positions_BT=positions).logits_BTV) > 0.01


def test_grouped_heads_equal_repeated_heads():
    params, tokens = random_params(TINY, EXPERTS), random_tokens(TINY, 2, LENGTH)
    times = TINY.num_heads // TINY.num_kv_heads
    blocks = params["trunk"]["blocks"]
    norm_LGK = blocks["k_norm"].reshape(TINY.num_layers, TINY.num_kv_heads, TINY.head_dim)
    repeated = {name: jnp.repeat(blocks[name], times, axis=2) for name in ("w_k", "w_v")}
    repeated["k_norm"] = jnp.repeat(norm_LGK, times, axis=1).reshape(TINY.num_layers, -1)
    full = {**params, "trunk": {**params["trunk"], "blocks": {**blocks, **repeated}}}
    config = dataclasses.replace(TINY, num_kv_heads=TINY.num_heads)
    ours = jit_forward(TINY, params, tokens, top_k=2).logits_BTV
    # The same sums in another order: float32 rounding of logits of order 1.
    assert max_difference(ours, jit_forward(config, full, tokens, top_k=2).logits_BTV) < 1e-5


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["olmo", "llama"])
def test_decoding_with_a_cache_equals_the_full_forward_pass(config):
    """Rows of different lengths: the shorter row's padding is written, then overwritten before a query can see it."""
    params, tokens = random_params(config, EXPERTS), random_tokens(config, 2, LENGTH)
    whole = jit_forward(config, params, tokens, top_k=2).logits_BTV
    lengths = np.array([7, 4])
    cache = init_cache(config, 2, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    padded = tokens[:, :7].at[1, 4:].set(0)
    run = Decoder(config, 2)
    logits_BTV, cache = jit_decode(run, params, padded, positions, cache)
    # One new query against cached keys is the same sum over more slots (masked ones add exact zeros): rounding only.
    assert max_difference(logits_BTV[0], whole[0, :7]) < 1e-5
    assert max_difference(logits_BTV[1, :4], whole[1, :4]) < 1e-5
    for step in range(5):
        at = jnp.asarray(lengths + step)[:, None]
        token = jnp.take_along_axis(tokens, at, axis=1)
        logits_BTV, cache = jit_decode(run, params, token, at, cache)
        expected = jnp.take_along_axis(whole, at[:, :, None], axis=1)
        assert max_difference(logits_BTV, expected) < 1e-5, step


def test_a_position_past_the_cache_writes_nothing():
    params, tokens = random_params(TINY), random_tokens(TINY, 1, 1)
    cache = jax.tree.map(lambda leaf: leaf + 1, init_cache(TINY, 1, 4))
    _, written = jit_decode(Decoder(TINY), params, tokens, jnp.full((1, 1), 4), cache)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), cache, written))


@pytest.mark.parametrize(("length", "block"), [(37, 8), (64, 16), (9, 128)])
def test_blocked_attention_equals_masked_softmax_in_values_and_gradients(monkeypatch, length, block):
    """The derivative of attention in blocks is written by hand."""
    monkeypatch.setattr(attention, "MIN_BLOCK", block)
    rng = np.random.default_rng(0)
    shapes = ((2, length, 4, 6), (2, length, 2, 6), (2, length, 2, 6), (2, length, 4, 6))
    q, k, v, mix = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.cumsum(rng.random((2, length)) < 0.1, axis=1), jnp.int32)
    mask = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((length, length), bool))

    def plain(q, k, v):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return (attention.attend(q, k, v, mask) * mix).sum()

    whole = jax.value_and_grad(plain, (0, 1, 2))(q, k, v)
    blocks = jax.jit(
        jax.value_and_grad(lambda q, k, v: (attention.attend_documents(q, k, v, segments) * mix).sum(), (0, 1, 2))
    )(q, k, v)
    for ours, theirs in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        # Values of order 1 to 10, sums of at most `length` terms in another order.
        assert max_difference(ours, theirs) < 1e-5 * max(1.0, float(jnp.abs(theirs).max()))


def test_the_derivative_of_rope_equals_finite_differences():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 6)), jnp.float32)
    table = rope_table(dataclasses.replace(TINY, head_dim=6, rope_theta=5e5), jnp.arange(5)[None])
    jax.test_util.check_grads(lambda x: apply_rope(x, *table), (x,), order=1, modes=["rev"])


def test_remat_changes_no_value():
    params, tokens = random_params(TINY, EXPERTS), random_tokens(TINY, 2, LENGTH)
    ours = [jit_forward(TINY, params, tokens, top_k=2, remat=remat).logits_BTV for remat in (False, True)]
    assert np.array_equal(*ours)
