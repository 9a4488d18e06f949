"""FlexMoE: language models whose experts belong to different data owners (FlexOlmo, arXiv 2507.07024, in JAX).

    import flexmoe_jax as fm

    texts = [d.text for d in fm.read_documents("data")]  # .txt, .jsonl, .parquet files
    fm.embed("data", out="domain.json")                  # the domain vector of an owner's documents
    package = fm.train(fm.RunConfig(owner="news", ...))  # an expert beside a public model
    fm.merge("release/model", [package], "model")        # one model, without training
    model = fm.load("model")                             # experts by name; logits, text, scores
    fm.opt_out("model", "news", certificate="news-left.json")
    fm.replace("model", "news/package")
    fm.verify("model")                                   # checks every digest

Each of these names is imported when it is first used: importing this package does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import Check, FlexMoEError
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from flexmoe_jax.api import Model, load
    from flexmoe_jax.compose.merge import merge
    from flexmoe_jax.compose.optout import opt_out, replace
    from flexmoe_jax.compose.verify import verify
    from flexmoe_jax.data.embedding import embed
    from flexmoe_jax.data.sources import read_documents
    from flexmoe_jax.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Check",
    "FlexMoEError",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "embed",
    "load",
    "merge",
    "opt_out",
    "read_documents",
    "replace",
    "train",
    "verify",
]

_HOMES = {
    "Model": "api",
    "load": "api",
    "embed": "data.embedding",
    "read_documents": "data.sources",
    "train": "training.loop",
    "merge": "compose.merge",
    "opt_out": "compose.optout",
    "replace": "compose.optout",
    "verify": "compose.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"flexmoe_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
