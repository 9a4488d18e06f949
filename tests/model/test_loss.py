"""The chunked next-token loss: equal to the formula over all logits, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.model import loss as loss_module
from flexmoe_jax.model.loss import next_token_loss
from tests.tiny import max_difference

B, T, D, V, Z = 3, 13, 8, 40, 1e-2


def inputs():
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.8)
    targets = rng.integers(0, V, (B, T))
    return [jnp.asarray(a, jnp.float32) for a in (x, head)], jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def whole(x, head, targets, weights):
    logits = x @ head
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weights * (nll + Z * log_z**2)).sum(), nll, log_z


@pytest.mark.parametrize("chunk_logits", [B * V, 5 * B * V, 1 << 20], ids=["1 token", "5 of 13 tokens", "all"])
@pytest.mark.parametrize("rows", [D, 3], ids=["one head", "in two parts"])
def test_the_chunked_loss_equals_the_formula_in_values_and_gradients(monkeypatch, chunk_logits, rows):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_logits)
    arrays, targets, weights = inputs()

    @jax.jit
    def chunked(x, head):
        parts = [part for part in (head[:rows], head[rows:]) if len(part)]
        return next_token_loss(x, parts, targets, weights, Z)

    for ours, theirs in zip(chunked(*arrays), whole(*arrays, targets, weights), strict=True):
        assert max_difference(ours, theirs) < 2e-5  # float32 sums of values of order 10 in another order
    expected = jax.grad(lambda *a: 3 * whole(*a, targets, weights)[0], (0, 1))(*arrays)
    both = jax.grad(lambda *a: 3 * chunked(*a)[0], (0, 1))(*arrays)
    one_each = [jax.grad(lambda *a: 3 * chunked(*a)[0], at)(*arrays) for at in (0, 1)]
    for ours in (both, one_each):
        for mine, theirs in zip(ours, expected, strict=True):
            assert max_difference(mine, theirs) < 1e-5 * float(jnp.abs(theirs).max())


def test_a_frozen_head_costs_no_gradient():
    """Of the two [V, D] sized products of the backward pass only the one for the hidden states remains."""
    (x, head), targets, weights = inputs()

    def products(argnums):
        gradient = jax.grad(lambda x, head: next_token_loss(x, (head,), targets, weights)[0], argnums)
        return str(jax.make_jaxpr(gradient)(x, head)).count("dot_general")

    assert (products((0, 1)), products(0)) == (3, 2)


def test_no_array_holds_all_logits():
    text = jax.jit(jax.grad(lambda x, head: next_token_loss(x, (head,), *rest)[0], (0, 1)))
    x, head = jnp.zeros((4, 512, 8)), jnp.zeros((8, 8192))
    rest = jnp.zeros((4, 512), jnp.int32), jnp.ones((4, 512))
    # 4 * 512 * 8192 logits are 64 MiB; a chunk is 8 MiB, and few of them exist at a time.
    assert text.lower(x, head).compile().memory_analysis().temp_size_in_bytes < 32 << 20
