"""Sampling follows its temperature, and every step of a generation draws by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.model.decoder import Decoder
from flexmoe_jax.model.generate import Sampling, generate, sample
from tests.tiny import TINY, random_params, stacked


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_divides_the_logits(temperature):
    """4,000 draws have the frequencies of softmax(logits / temperature), to four standard deviations (0.03)."""
    logits_BV = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (4000, 4))
    drawn = np.asarray(sample(jax.random.key(0), logits_BV, Sampling(temperature)))
    expected = jax.nn.softmax(logits_BV[0] / temperature)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)


def test_every_step_and_every_row_draws_by_itself():
    """With equal logits at every step, 24 steps of one key would repeat one token; the seed decides them all."""
    params = random_params(TINY)
    params["trunk"]["head"] = jnp.zeros_like(params["trunk"]["head"])
    how = {"max_new_tokens": 24, "stop_ids": (), "sampling": Sampling(1.0)}
    rows, again, other = (generate(Decoder(TINY), stacked(params), [[1], [1]], seed=s, **how) for s in (0, 0, 1))
    assert rows == again != other
    for row in (*rows, *other):
        assert len({*row}) > 8  # of 24 ids: 15 are expected in 24 draws, and 8 or fewer once in a million
    assert rows[0] != rows[1]
