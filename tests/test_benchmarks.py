"""The benchmarks: no figure for outputs that disagree, and a GPU script that runs before there is a GPU."""

import json

import numpy as np
import pytest

from benchmarks import gpu, harness
from flexmoe_jax.config import ModelConfig


def test_outputs_that_disagree_stop_the_benchmark():
    theirs = np.array([1.0, -200.0])
    harness.require_close("x", theirs + 0.01, theirs, 1e-4)
    for ours in (theirs + 0.03, theirs * np.nan):
        with pytest.raises(SystemExit, match="no figure is printed"):
            harness.require_close("x", ours, theirs, 1e-4)


def test_needed_flops_of_a_model_counted_by_hand():
    model = ModelConfig(
        vocab_size=7, num_layers=1, d_model=2, num_heads=1, num_kv_heads=1, head_dim=2, d_ff=3, max_seq_len=4
    )
    tokens, head, ffn, projections = 4, 2 * 7, 3 * 2 * 3, 4 * 2 * 2
    norms = 4 * 2 + 2  # counted as weights: far below a percent at any real size
    scores = 2 * tokens * tokens * 2
    forward = 2 * tokens * (head + projections + norms + ffn) + scores
    assert harness.needed_flops(model, "dense", 1, tokens) == 3 * forward
    frozen = 2 * tokens * (head + projections + norms + 2 * ffn)
    assert harness.needed_flops(model, "hybrid", 1, tokens) == 2 * frozen + 3 * scores + 2 * tokens * ffn


def test_the_gpu_script_runs_at_toy_size_and_says_what_it_would_run(capsys):
    assert gpu.main(["--tiny", "--batch", "1"]) == 0
    first, _, result = capsys.readouterr().out.partition("\n")
    assert "2 layers, width 64" in first
    assert json.loads(result)["tokens_per_s"] > 0
    assert gpu.main(["--layers", "4"]) == 0  # at full size on a CPU: words only
    assert "4 layers, width 4096" in capsys.readouterr().out
