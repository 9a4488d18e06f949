"""Choosing the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from flexmoe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_k` keeps the k likeliest tokens, `top_p` the smallest set of at least that mass."""

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


def sample(key, logits_BV, sampling: Sampling):
    """float32 logits [B, V] -> int32 token ids [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
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
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
