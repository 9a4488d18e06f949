"""A stored loss curve: 20 steps of plain gradient descent, without the training loop. A refactor does not change it.

After an intended change of the mathematics run `python -m tests.model.test_curve`, and say so in the change log.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.model.decoder import Decoder, forward
from tests.tiny import TINY, random_params, random_tokens, stacked

STORED = pathlib.Path(__file__).with_name("curve.json")
EXPERTS = ("public", "code", "news")
STEPS, RATE = 20, 0.1


@functools.cache
def curve(dispatch: str) -> list[float]:
    """Next-token losses of 20 steps on one batch of packed documents, two of three experts active."""
    params = random_params(TINY, EXPERTS)
    if dispatch == "sparse":
        params = stacked(params)
    tokens = random_tokens(TINY, 4, 17)
    segments = jnp.asarray([[0] * 9 + [1] * 7] * 4, jnp.int32)

    def loss(params):
        out = forward(Decoder(TINY, 2, dispatch), params, tokens[:, :-1], segments_BT=segments)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits_BTV), tokens[:, 1:, None], axis=-1)
        return -picked.mean() + 1e-3 * (jax.nn.logsumexp(out.router_logits_LNE, axis=-1) ** 2).mean()

    @jax.jit
    def step(params):
        value, slope = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, slope), value

    losses = []
    for _ in range(STEPS):
        params, value = step(params)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_loss_curve_equals_the_stored_one(dispatch):
    stored = json.loads(STORED.read_text())
    assert len(stored) == STEPS
    assert stored[-1] < stored[0] - 1  # the model learns: the curve depends on gradients, not only on the forward pass
    # One step rounds by 1e-7; twenty steps at this rate amplify that less than tenfold (dense and sparse, which sum in
    # different orders, differ by 8e-7), so another machine stays within 1e-5; a changed formula is far outside.
    np.testing.assert_allclose(curve(dispatch), stored, rtol=1e-5, atol=0)


if __name__ == "__main__":
    STORED.write_text(json.dumps(curve("dense"), indent=1) + "\n")
