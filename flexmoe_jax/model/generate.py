"""Batched generation with a key/value cache: one prefill of the prompts, then one token of every row per step."""

import dataclasses
import functools
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.errors import ConfigError, DataError
from flexmoe_jax.model.decoder import Decoder, decode, logits, prefill
from flexmoe_jax.tree import Params

_LENGTH_STEP = 64  # prompts and caches are padded to multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_k` keeps the k likeliest tokens, `top_p` the smallest set of at least that mass.

    ConfigError for a negative temperature, a `top_k` below 1, or a `top_p` outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}", "give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"the sampling top-k is {self.top_k}", "give at least 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"the sampling top-p is {self.top_p}", "give a mass above 0 and at most 1")


GREEDY = Sampling()


def sample(key: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits [B, V] -> sampled int32 token ids [B]; greedy sampling ignores `key`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, drawn_from(logits_BV, sampling), axis=-1).astype(jnp.int32)


def drawn_from(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits [B, V] that a `sampling` of a temperature above 0 draws from; -inf for tokens that it never draws."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        least_B1 = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def generate(run: Decoder, params: Params, prompts: list[list[int]], **kwargs) -> list[list[int]]:
    """The new token ids of each prompt; arguments and errors as of `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(run, params, prompts, **kwargs):
        for row, token in tokens.items():
            rows[row].append(token)
    return rows


def stream(
    run: Decoder,
    params: Params,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Iterator[dict[int, int]]:
    """Yields {row: next token} of the rows that continue, step by step, as soon as the tokens are known.

    `prompts` are lists of token ids of any lengths. A row ends before the first of `stop_ids` or after
    `max_new_tokens`. The cache is in the dtype of `run`. Rows do not influence one another. DataError for an empty
    prompt, or one that exceeds `max_seq_len` together with `max_new_tokens`.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    limit = run.config.max_seq_len
    if not prompts or lengths.min() < 1:
        raise DataError("a prompt has no token", "give at least one: the end-of-text token stands for empty text")
    if lengths.max() + max_new_tokens > limit:
        raise DataError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new tokens exceed the model's {limit}",
            f"shorten the prompt or ask for at most {max(limit - int(lengths.max()), 0)} new tokens",
        )
    return _stream(run, sampling, params, prompts, lengths, max_new_tokens, frozenset(stop_ids), seed)


def _stream(
    run: Decoder,
    sampling: Sampling,
    params: Params,
    prompts: list[list[int]],
    lengths: np.ndarray,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
) -> Iterator[dict[int, int]]:
    # Right-padding is harmless: no query sees its cache slots before they are overwritten.
    tokens_BT = np.zeros((len(prompts), _round_up(lengths.max())), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    length = max(_round_up(lengths.max() + max_new_tokens), tokens_BT.shape[1])
    key = jax.random.key(seed)
    token_B, cache = first_token(run, sampling, length, params, jax.random.fold_in(key, 0), tokens_BT, lengths)
    open_rows = list(range(len(prompts)))
    for n in range(max_new_tokens):
        tokens = np.asarray(token_B)
        open_rows = [row for row in open_rows if int(tokens[row]) not in stop_ids]
        if not open_rows:
            return
        last = n + 1 == max_new_tokens
        if not last:  # dispatched before this step's tokens are yielded
            position_B = (lengths + n).astype(np.int32)
            key_n = jax.random.fold_in(key, n + 1)
            token_B, cache = next_token(run, sampling, params, key_n, token_B, position_B, cache)
        yield {row: int(tokens[row]) for row in open_rows}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def first_token(
    run: Decoder,
    sampling: Sampling,
    length: int,
    params: Params,
    key: jax.Array,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, Params]:
    """Prompts int32 [B, T], right-padded, of `lengths_B` -> (first new token of each row int32 [B], cache of `length`).

    The head runs only on the last token of each prompt.
    """
    x_BTD, cache = prefill(run, params, tokens_BT, length)
    x_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return sample(key, logits(run, params, x_BD), sampling), cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(6,))
def next_token(
    run: Decoder,
    sampling: Sampling,
    params: Params,
    key: jax.Array,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Params,
) -> tuple[jax.Array, Params]:
    """int32 tokens [B] at `position_B` -> (next token of each row int32 [B], cache); donates the old cache."""
    x_B1D, cache = decode(run, params, token_B[:, None], position_B[:, None], cache)
    return sample(key, logits(run, params, x_B1D[:, 0]), sampling), cache


def _round_up(n: int) -> int:
    return -(-int(n) // _LENGTH_STEP) * _LENGTH_STEP
