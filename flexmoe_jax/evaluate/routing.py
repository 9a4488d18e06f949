"""Which experts a text's tokens go to, layer by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.model.router import route
from flexmoe_jax.model.transformer import hidden_states
from flexmoe_jax.tree import Params


@dataclasses.dataclass(frozen=True)
class TokenRouting:
    """`pieces` are the T tokens' texts, joined the text; `weights_LTE` float32 what each layer gives each expert.

    Weights are those of the active experts, normalised to a sum of one; experts in canonical order.
    """

    pieces: list[str]
    weights_LTE: np.ndarray


def route_text(
    config: ModelConfig, params: Params, text: str, tokenizer: Tokenizer, *, top_k: int | None = None,
    dispatch: str = "dense",
) -> TokenRouting:  # fmt: skip
    """The routing of the first `config.max_seq_len` tokens of `text`, read after the end-of-text token.

    A token's routing is that of the position that reads it. Characters cut in two between tokens belong to the last.
    """
    ids = tokenizer.encode(text)[: config.max_seq_len - 1]
    if not ids:
        raise DataError("there is no token to route", "give a text")
    tokens_1T = jnp.asarray([[tokenizer.eos_id, *ids]], jnp.int32)
    weights_LTE = np.asarray(_weights(config, top_k, dispatch, params, tokens_1T))[:, 1:]
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        whole = shown if whole.endswith("\ufffd") and end < len(ids) else whole
        pieces.append(whole[len(shown) :])
        shown = whole
    return TokenRouting(pieces, weights_LTE)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _weights(config, top_k, dispatch, params, tokens_1T):
    _, router_logits_LNE, _ = hidden_states(config, params, tokens_1T, top_k=top_k, dispatch=dispatch)
    E = router_logits_LNE.shape[-1]
    weights_LNE = jax.vmap(lambda logits_NE: route(logits_NE, min(top_k or E, E)).weights_NE)(router_logits_LNE)
    return weights_LNE / weights_LNE.sum(-1, keepdims=True)
