"""Every test of the model runs under strict dtype promotion: an implicit cast is an error."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_dtypes():
    # Full float32 products also on accelerators that default to TF32: the tolerances here are those of float32.
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        yield
