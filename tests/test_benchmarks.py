"""The benchmarks print no figure for outputs that disagree, and the GPU script runs without a GPU."""

import json

import numpy as np
import pytest

from benchmarks import gpu, harness


def test_outputs_that_disagree_stop_the_benchmark():
    theirs = np.array([1.0, -200.0])
    harness.require_close("x", theirs + 0.01, theirs, 1e-4)
    for ours in (theirs + 0.03, theirs * np.nan):
        with pytest.raises(SystemExit, match="no figure is printed"):
            harness.require_close("x", ours, theirs, 1e-4)


def test_the_gpu_script_runs_at_toy_size_and_only_prints_its_full_size_on_a_cpu(capsys):
    assert gpu.main(["--shape", "tiny", "--batch", "1"]) == 0
    first, _, result = capsys.readouterr().out.partition("\n")
    assert "2 layers, width 64" in first
    assert json.loads(result)["tokens_per_s"] > 0
    assert gpu.main(["--layers", "4"]) == 0  # full size on a CPU: nothing is run
    assert "4 layers, width 4096" in capsys.readouterr().out
