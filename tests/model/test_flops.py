"""FLOPs of a model that is small enough to count by hand."""

import pytest

from flexmoe_jax.model.flops import forward_flops, training_flops
from flexmoe_jax.model_config import ModelConfig

T, HEAD, FFN, PROJECTIONS = 4, 2 * 2 * 7, 2 * 3 * 2 * 3, 2 * 4 * 2 * 2
NORMS = 2 * (4 * 2 + 2)  # counted as weights: far below a percent at any real size
SCORES = 2 * T * 2
MODEL = ModelConfig(
    vocab_size=7, num_layers=1, d_model=2, num_heads=1, num_kv_heads=1, head_dim=2, d_ff=3, max_seq_len=4
)


def test_forward_flops_equal_the_count_by_hand():
    assert forward_flops(MODEL, T, 3) == HEAD + PROJECTIONS + NORMS + SCORES + 3 * FFN


def test_training_flops_count_weight_gradients_only_of_trained_weights():
    frozen = HEAD + PROJECTIONS + NORMS
    assert training_flops(MODEL, T, "joint", 2) == 3 * (frozen + SCORES + 2 * FFN)
    assert training_flops(MODEL, T, "expert") == 2 * (frozen + 2 * FFN) + 3 * SCORES + FFN
    low = 2 * MODEL.num_layers * 2 * 2 * (MODEL.d_model + MODEL.d_ff)  # two products each for A and B of rank 2
    assert training_flops(MODEL, T, "expert", ranks=dict.fromkeys(("w_up", "w_gate", "w_down"), 2)) == pytest.approx(
        2 * (frozen + 2 * FFN) + 3 * SCORES + 3 * low
    )
    assert training_flops(MODEL, T, "alone") == 2 * (frozen + FFN) + 3 * SCORES + FFN
