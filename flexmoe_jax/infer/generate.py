"""Batched generation with a key/value cache: one prefill over the prompts, then one token of every row per step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.errors import DataError
from flexmoe_jax.infer.sampling import GREEDY, Sampling, sample
from flexmoe_jax.model.cache import init_cache
from flexmoe_jax.model.transformer import forward
from flexmoe_jax.tree import Params

_LENGTH_STEP = 64  # prompts and caches are padded to multiples of this, so that few shapes are compiled


def generate(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    top_k: int | None = None,
    dispatch: str = "dense",
) -> list[list[int]]:
    """Continues token-id prompts of any lengths; each row ends before `eos_id` or after `max_new_tokens`.

    `top_k` and `dispatch` are those of `forward`. Rows do not influence one another.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    if lengths.min() < 1:
        raise DataError("a prompt has no token", "give at least one token, the end-of-text token for an empty start")
    if lengths.max() + max_new_tokens > config.max_seq_len:
        raise DataError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones exceed the model's {config.max_seq_len}",
            f"shorten the prompt or ask for at most {max(config.max_seq_len - int(lengths.max()), 0)} new tokens",
        )
    width = _round_up(lengths.max())
    tokens_BT = np.full((len(prompts), width), eos_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt

    run = functools.partial(_advance, config, params, sampling, top_k, dispatch)
    cache = init_cache(config, len(prompts), _round_up(lengths.max() + max_new_tokens))
    key = jax.random.key(seed)
    positions_BT = np.broadcast_to(np.arange(width, dtype=np.int32), tokens_BT.shape)
    # Right-padding is harmless: its cache slots lie after every position in use, until they are overwritten.
    token_B, cache = run(jax.random.fold_in(key, 0), tokens_BT, positions_BT, lengths - 1, cache)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for n in range(max_new_tokens):
        for row in sorted(open_rows):
            token = int(token_B[row])
            if token == eos_id:
                open_rows.discard(row)
            else:
                rows[row].append(token)
        if not open_rows or n + 1 == max_new_tokens:
            break
        positions_B1 = (lengths + n)[:, None].astype(np.int32)
        last_B = np.zeros(len(prompts), np.int32)
        token_B, cache = run(jax.random.fold_in(key, n + 1), token_B[:, None], positions_B1, last_B, cache)
    return rows


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4), donate_argnums=(9,))
def _advance(config, params, sampling, top_k, dispatch, key, tokens_BT, positions_BT, last_B, cache):
    """Runs tokens at their positions and samples from the logits at index `last_B` of each row."""
    out = forward(config, params, tokens_BT, positions_BT=positions_BT, kv_cache=cache, top_k=top_k, dispatch=dispatch)
    logits_BV = jnp.take_along_axis(out.logits_BTV, last_B[:, None, None], axis=1)[:, 0]
    return sample(key, logits_BV, sampling), out.cache


def _round_up(n) -> int:
    return -(-int(n) // _LENGTH_STEP) * _LENGTH_STEP
