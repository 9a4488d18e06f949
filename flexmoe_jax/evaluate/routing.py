"""The experts to which each layer routes the tokens of a text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.data.tokenizer import Tokenizer
from flexmoe_jax.errors import DataError
from flexmoe_jax.evaluate.perplexity import routed_share
from flexmoe_jax.model.decoder import Decoder, hidden_states
from flexmoe_jax.model.precision import exact
from flexmoe_jax.tree import Params


@dataclasses.dataclass(frozen=True)
class TokenRouting:
    """`pieces` are the texts of the T tokens (joined: the text), `weights_LTE` float32 the weight of each expert.

    Weights of the active experts sum to one; experts are in canonical order.
    """

    pieces: list[str]
    weights_LTE: np.ndarray


def route_text(run: Decoder, params: Params, text: str, tokenizer: Tokenizer) -> TokenRouting:
    """The routing of the first `max_seq_len - 1` tokens of `text`, read after the token that starts one.

    A token's routing is that of the position that reads it. A character of several tokens belongs to its last token.
    DataError if there is no token.
    """
    ids = tokenizer.encode(text)[: run.config.max_seq_len - 1]
    if not ids:
        raise DataError("there is no token to route", "give a text that is not empty")
    tokens_1T = jnp.asarray([[tokenizer.start_id, *ids]], jnp.int32)
    weights_LTE = np.asarray(_weights(run, params, tokens_1T))[:, 1:]
    *pieces, rest = [*tokenizer.pieces(ids), ""]
    pieces[len(ids) - 1 :] = ["".join(pieces[len(ids) - 1 :]) + rest]
    return TokenRouting(pieces, weights_LTE)


@functools.partial(jax.jit, static_argnums=0)
@exact
def _weights(run: Decoder, params: Params, tokens_1T: jax.Array) -> jax.Array:
    return routed_share(run, hidden_states(run, params, tokens_1T)[1])
