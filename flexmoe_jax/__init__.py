"""FlexMoE: language models whose parts belong to different data owners.

`load(path)` opens a model directory as a `Model`. Everything else is imported from its own module. Importing this
package does not import JAX.
"""

__version__ = "0.1.0"
__all__ = ["FlexMoEError", "Model", "load"]

from flexmoe_jax.errors import FlexMoEError


def __getattr__(name: str):
    if name in ("Model", "load"):
        from flexmoe_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
