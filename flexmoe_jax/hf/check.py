"""A check that `transformers` computes the same logits from an export as we do from the model."""

import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.artifacts.model_dir import ModelDir, load_params
from flexmoe_jax.errors import ArtifactError, ConfigError
from flexmoe_jax.model.decoder import Decoder, forward

# Largest difference relative to the largest logit. Both sides compute in float32 and sum in different orders: about
# 1e-6 per layer. A wrong layout, head order or rotary base gives differences as large as the logits.
TOLERANCE = 1e-3
TOKENS = 32


def compare_logits(
    export: pathlib.Path | str, model: ModelDir, experts: Iterable[str], *, custom_code: bool, leave_out_bias: bool
) -> float:
    """Loads the export with transformers; returns the largest difference of logits, relative to the largest logit.

    The input are fixed random tokens [2, 32]; both models are in memory, in float32. `custom_code` trusts the model
    file of the export; `leave_out_bias` sets our experts' bias to 0. Raises ArtifactError above TOLERANCE, ConfigError
    without torch or transformers.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            "comparing logits needs torch and transformers",
            "pip install 'flexmoe_jax[hf]', or compare only bytes with --no-logits",
        ) from error
    length = min(TOKENS, model.config.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length), np.int64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(export), dtype=torch.float32, trust_remote_code=custom_code, use_safetensors=True, local_files_only=True
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    del theirs
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), load_params(model, experts))
    if leave_out_bias:
        params["experts"] = {n: {**e, "bias": jnp.zeros_like(e["bias"])} for n, e in params["experts"].items()}
    run = Decoder(model.config, model.top_k)
    logits = np.asarray(forward(run, params, jnp.asarray(tokens, jnp.int32)).logits_BTV)
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{export}: transformers' logits differ from ours by {difference:.2g} of the largest, over {TOLERANCE:g}",
            "do not publish this export; report it with your versions of torch and transformers",
        )
    return difference
