"""Shared by tests of several folders: a tiny shape, deterministic parameters, and reproducible property tests."""

import functools
import math
import os
import zlib

from flexmoe_jax.cli.main import use_compilation_cache

# Test processes share compiled programs: the same small training step is compiled once, not thirty times.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
use_compilation_cache()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.model.decoder import Decoder, Output, decode, forward, logits
from flexmoe_jax.parallel.mesh import mesh_of_one
from flexmoe_jax.parallel.specs import place
from flexmoe_jax.parallel.stacked import stack_weights
from flexmoe_jax.params import model_leaves
from flexmoe_jax.tree import PUBLIC, Params, unflatten

# The same examples on every run, so that a failure is due to a change of the code; no deadline: the first one compiles.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

TINY = ModelConfig(
    vocab_size=24, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12, max_seq_len=32
)

_forward = jax.jit(forward, static_argnums=0)


def jit_forward(
    config: ModelConfig, params: Params, tokens_BT, *, segments_BT=None, positions_BT=None, **how
) -> Output:
    """Compiled `forward` of the `Decoder` with the fields `how`."""
    arrays = {"segments_BT": segments_BT, "positions_BT": positions_BT}
    return _forward(Decoder(config, **how), params, tokens_BT, **arrays)


@functools.partial(jax.jit, static_argnums=0)
def jit_decode(run: Decoder, params: Params, tokens_BT, positions_BT, kv_cache):
    """(logits [B, T, V], cache) after the tokens are written at `positions_BT` of the cache."""
    x_BTD, kv_cache = decode(run, params, tokens_BT, positions_BT, kv_cache)
    return logits(run, params, x_BTD), kv_cache


def stacked(params: Params) -> Params:
    """Named parameters in the form in which models run: on one device, experts stacked."""
    return place(mesh_of_one(), {**params, "experts": stack_weights(params["experts"])})


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY


def random_params(config: ModelConfig, experts: tuple[str, ...] = (PUBLIC,), seed: int = 0) -> Params:
    """Named parameters of ordinary scale in which nothing is neutral: norms away from 1, owners' biases below 0.

    A leaf's values depend only on its path and `seed`, so a model of fewer experts holds the same ones.
    """

    def draw(path: str, shape: tuple[int, ...]):
        normal = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(shape)
        leaf = path.rpartition("/")[2]
        if leaf == "bias":
            values = 0 * normal if path == f"experts/{PUBLIC}/bias" else -0.1 - np.abs(normal)
        elif leaf.endswith("norm"):
            values = 1 + 0.3 * normal
        else:
            fan_in = {"w_o": math.prod(shape[1:-1]), "w_down": config.d_ff, "embed": 1}.get(leaf, config.d_model)
            values = normal / math.sqrt(fan_in)
        return jnp.asarray(values, jnp.float32)

    return unflatten({path: draw(path, leaf.shape) for path, leaf in model_leaves(config, experts).items()})


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0):
    """int32 [batch, length], deterministic."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)), jnp.int32)


def max_difference(ours, theirs) -> float:
    """Largest absolute difference; shapes must agree and NaN counts as infinite."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max(initial=0.0))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A trained public release, two experts and their merged model on disk (`tests/training/tiny.py`); read only."""
    from tests.training.tiny import build_world

    return build_world(tmp_path_factory.mktemp("world"))
