"""What a model says of every token of a text: its probability, that of others, and that of being drawn."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.errors import DataError
from flexmoe_jax.model.decoder import Decoder, hidden_states, logits
from flexmoe_jax.model.generate import Sampling, drawn_from
from flexmoe_jax.model.precision import exact
from flexmoe_jax.parallel.mesh import everywhere
from flexmoe_jax.tree import Params

_ROWS, _TOKENS = 8, 8192  # rows at a time, and their tokens
_LENGTH_STEP = 64  # lengths are padded to multiples of this: few shapes are compiled; as many have logits at a time


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Of the tokens of one row that follow others, float32 [n], in nats.

    `log_p` is the log-probability of the token, `mean` and `deviation` those of log p(z) for z drawn from p, and
    `drawn` the log-probability that a sampling draws the token: -inf for one that it never draws.
    """

    log_p: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    drawn: np.ndarray


def token_statistics(run: Decoder, params: Params, rows: list[list[int]], sampling: Sampling) -> list[TokenStatistics]:
    """Statistics of `rows` of token ids, each of at least two and at most `max_seq_len` + 1; DataError for others.

    `params` have stacked experts. Rows do not influence one another.
    """
    limit = run.config.max_seq_len
    if wrong := [len(row) for row in rows if not 2 <= len(row) <= limit + 1]:
        raise DataError(f"a row has {wrong[0]} tokens", f"give from 2 to {limit + 1}, the model's max_seq_len and one")
    found: list[TokenStatistics | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    while order:
        longest = min(-(-(len(rows[order[-1]]) - 1) // _LENGTH_STEP) * _LENGTH_STEP, limit)
        count = max(1, min(_ROWS, _TOKENS // longest))
        batch = order[-count:]
        del order[-count:]
        tokens_BT = np.zeros((count, longest + 1), np.int32)
        for i, n in enumerate(batch):
            tokens_BT[i, : len(rows[n])] = rows[n]
        values = [np.asarray(value) for value in _statistics(run, sampling, params, tokens_BT)]
        for i, n in enumerate(batch):
            found[n] = TokenStatistics(*(value[i, : len(rows[n]) - 1] for value in values))
    return [statistics for statistics in found if statistics is not None]


@functools.partial(jax.jit, static_argnums=(0, 1))
@exact
def _statistics(run: Decoder, sampling: Sampling, params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of `TokenStatistics` [B, T - 1]; the logits of `_LENGTH_STEP` tokens at a time."""
    x_BTD, _ = hidden_states(run, params, tokens_BT[:, :-1])

    def of_part(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_TD, next_T = part
        logits_TV = logits(run, params, x_TD)
        log_p_TV = jax.nn.log_softmax(logits_TV, axis=-1)
        p_TV = jnp.exp(log_p_TV)
        mean_T = (p_TV * log_p_TV).sum(-1)
        variance_T = (p_TV * jnp.square(log_p_TV - mean_T[:, None])).sum(-1)
        drawn_TV = jax.nn.log_softmax(drawn_from(logits_TV, sampling), axis=-1)
        log_p_T, drawn_T = (jnp.take_along_axis(a, next_T[:, None], axis=-1)[:, 0] for a in (log_p_TV, drawn_TV))
        return log_p_T, mean_T, jnp.sqrt(variance_T), drawn_T

    B, T, D = x_BTD.shape
    width = math.gcd(T, _LENGTH_STEP)
    parts = jax.lax.map(of_part, (x_BTD.reshape(-1, width, D), tokens_BT[:, 1:].reshape(-1, width)))
    return jax.tree.map(lambda value: everywhere(value.reshape(B, T)), parts)
