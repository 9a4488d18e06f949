"""Every test of the model runs under strict promotion: a cast that is not written is an error."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_dtypes():
    # float32 products in full, also on accelerators that would use TF32: the tolerances here are those of float32.
    with jax.numpy_dtype_promotion("strict"), jax.default_matmul_precision("highest"):
        yield
