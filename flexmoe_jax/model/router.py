"""The router: softmax over all experts in float32, then top-k (FlexOlmo, arXiv 2507.07024).

FlexOlmo does not renormalize the weights of the chosen experts; other public models need it (`ModelConfig.norm_topk`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from flexmoe_jax.model.precision import EXACT
from flexmoe_jax.model.products import as_bits, from_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of each token: `index_Nk` int32 lists those chosen, `weights_NE` float32 is zero for the others."""

    weights_NE: jax.Array
    index_Nk: jax.Array


def negative_part(bias: jax.Array) -> jax.Array:
    """min(bias, 0), with the derivative of the identity (straight-through).

    The plain derivative is 0 above zero: a bias above zero would never change again. A training step projects its
    biases to at most 0 after the update, so that only a bias that was stored before is ever above it.
    """
    return bias - jax.lax.stop_gradient(jnp.maximum(bias, 0.0))


def router_logits(x_ND: jax.Array, router_ED: jax.Array, bias_E: jax.Array) -> jax.Array:
    """s_i(x) = r_i . x + min(b_i, 0): x [N, D], router [E, D], bias [E] -> float32 [N, E] (paper section 3.3).

    Computed in float32 from the activations as they are; rows and biases are not rounded to the dtype of x.
    """
    return _products(x_ND, router_ED) + negative_part(bias_E.astype(jnp.float32))


@jax.custom_vjp
def _products(x_ND: jax.Array, router_ED: jax.Array) -> jax.Array:
    """Its derivative keeps x in its own dtype: automatic differentiation would keep a float32 copy."""
    return _dot("ND,ED->NE", x_ND, router_ED)


def _products_bwd(residuals: tuple[jax.Array, jax.Array], d_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, router_ED = from_bits(residuals[0]), residuals[1]
    dx_ND, drouter_ED = _dot("NE,ED->ND", d_NE, router_ED), _dot("NE,ND->ED", d_NE, x_ND)
    return dx_ND.astype(x_ND.dtype), drouter_ED.astype(router_ED.dtype)


_products.defvjp(lambda x_ND, router_ED: (_products(x_ND, router_ED), (as_bits(x_ND), router_ED)), _products_bwd)


def _dot(axes: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(axes, *(operand.astype(jnp.float32) for operand in operands), precision=EXACT)


def route(logits_NE: jax.Array, k: int, norm_topk: bool = False) -> Routing:
    """float32 logits [N, E] -> the top-k of the softmax over all experts; ties go to the first expert in the order.

    With `norm_topk` the softmax is over the chosen experts: their weights add up to 1.
    """
    E = logits_NE.shape[-1]
    probs_NE = jax.nn.softmax(logits_NE, axis=-1)
    if k >= E:
        return Routing(probs_NE, jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), probs_NE.shape))
    _, index_Nk = jax.lax.top_k(probs_NE, k)
    chosen_NE = jax.nn.one_hot(index_Nk, E, dtype=bool).any(axis=-2)
    if norm_topk:
        return Routing(jax.nn.softmax(logits_NE, axis=-1, where=chosen_NE), index_Nk)
    return Routing(jnp.where(chosen_NE, probs_NE, 0.0), index_Nk)


def route_uniform(logits_NE: jax.Array) -> Routing:
    """Ignores the values of the logits: every expert has weight 1/E (the control that routing has to beat)."""
    return route(jnp.zeros_like(logits_NE), logits_NE.shape[-1])
