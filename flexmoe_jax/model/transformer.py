"""The FlexMoE decoder: one pure function, and the Flax module that declares its parameters.

    h = h + norm_attn(attention(h));  h = h + norm_ffn(moe(h))        (OLMo-2: the norm is on the branch's output)

With `pre_norm` the norms move to the branches' inputs (Llama). Layers are scanned: every leaf of `blocks` and of each
expert has the layer as its first axis.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.model import attention, cache, router
from flexmoe_jax.model.expert_parallel import sparse_on_mesh
from flexmoe_jax.model.experts import DISPATCH, FFN_WEIGHTS
from flexmoe_jax.model.norm import rms_norm
from flexmoe_jax.model.rope import rope_table
from flexmoe_jax.parallel.mesh import current_mesh, split_batch
from flexmoe_jax.parallel.stacked import STACKED, with_stacked_rows
from flexmoe_jax.params import LeafSpec, owner_spec
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, canonical_order, is_stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Logits and router logits are float32, N = B*T, experts in canonical order; `cache` is updated, or None."""

    logits_BTV: jax.Array
    router_logits_LNE: jax.Array
    cache: Any


def forward(config: ModelConfig, params: Params, tokens_BT, **kwargs) -> Output:
    """Runs the decoder and its head on int32 tokens [B, T]; `kwargs` are those of `hidden_states`."""
    x_BTD, router_logits_LNE, kv_cache = hidden_states(config, params, tokens_BT, **kwargs)
    head_DV = head(config, params).astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
    return Output(logits_BTV, router_logits_LNE, kv_cache)


def head(config: ModelConfig, params: Params):
    """The output matrix [D, V]."""
    return params["trunk"]["embed"].T if config.tie_embeddings else params["trunk"]["head"]


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT,
    *,
    segments_BT=None,
    positions_BT=None,
    kv_cache=None,
    cache_length: int | None = None,
    top_k: int | None = None,
    dispatch: str = "dense",
    uniform: bool = False,
    dtype=jnp.float32,
    remat: bool = False,
    first_apart: bool = False,
):
    """Runs the decoder on int32 tokens [B, T] -> (x [B, T, D] after the last norm, router logits [L, N, E], cache).

    `params` is the whole tree with experts named or stacked. `segments_BT` int32 numbers the packed documents of a
    row: a token attends only within its own. With `kv_cache` the tokens are written at `positions_BT` and attend to
    the cache up to their own position instead; with `cache_length` a new cache of that many positions is begun with
    these tokens. `top_k` None runs every expert; `uniform` ignores the router and weighs all experts equally.
    Activations are in `dtype`; norms, softmax and router in float32. `remat` recomputes each layer in the backward
    pass: memory for activations shrinks to a layer's inputs, for a third more computation. `first_apart` keeps the
    first layer out of the scan, whose layers are differentiated alike: beside a frozen trunk nothing below the first
    layer's expert needs a derivative. It costs a copy of the other layers' weights; with a cache it does nothing.
    """
    B, T = tokens_BT.shape
    trunk = params["trunk"]
    if STACKED in params["experts"]:
        params = {**params, "experts": with_stacked_rows(params["experts"])}
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.zeros_like(tokens_BT)
    rope = rope_table(positions_BT, config.head_dim, config.rope_theta)
    scanned, whole = params["experts"], {}
    decoding = kv_cache is not None or cache_length is not None
    if decoding and dispatch == "sparse" and is_stacked(scanned) and current_mesh() is None:
        # A scan copies each layer's slice of what it scans: of every expert, where a few of them are wanted.
        whole = {name: scanned[name] for name in FFN_WEIGHTS}
        scanned = {name: scanned[name] for name in ("router", "bias")}

    def layer(x_BTD_and_cache, block_experts_index):
        (x_BTD, kv_cache), (block, experts, index) = x_BTD_and_cache, block_experts_index
        q, k, v = attention.project_qkv(config, block, _before(config, x_BTD, block["attn_norm"]), rope)
        begun = None
        if kv_cache is None:
            y_BTHK = attention.attend_documents(q, k, v, segments_BT)
            if cache_length is not None:
                begun = cache.layer_of(k, v, cache_length)
        else:
            kv_cache = cache.write(kv_cache, index, k, v, positions_BT)
            keys, values = (kv_cache[name][index].astype(q.dtype) for name in ("k", "v"))
            y_BTHK = attention.attend(q, keys, values, attention.cache_mask(positions_BT, keys.shape[2]))
        x_BTD = x_BTD + _after(config, attention.project_out(block, y_BTHK), block["attn_norm"])
        y_BTD, logits_NE = moe(
            _before(config, x_BTD, block["ffn_norm"]),
            {**experts, **whole},
            top_k=top_k,
            dispatch=dispatch,
            uniform=uniform,
            layer=index if whole else None,
        )
        x_BTD = split_batch(x_BTD + _after(config, y_BTD, block["ffn_norm"]))
        return (x_BTD, kv_cache), (logits_NE, begun)

    x_BTD = split_batch(trunk["embed"][tokens_BT].astype(dtype))
    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    layers = (trunk["blocks"], scanned, jnp.arange(config.num_layers))
    carry, first = (x_BTD, kv_cache), None
    if first_apart and not decoding:
        carry, first = body(carry, jax.tree.map(lambda a: a[0], layers))
        layers = jax.tree.map(lambda a: a[1:], layers)
    (x_BTD, kv_cache), (router_logits_LNE, begun) = jax.lax.scan(body, carry, layers)
    if first is not None:
        router_logits_LNE = jnp.concatenate([first[0][None], router_logits_LNE])
    return rms_norm(x_BTD, trunk["final_norm"], config.norm_eps), router_logits_LNE, begun or kv_cache


def moe(x_BTD, experts, *, top_k: int | None, dispatch: str = "dense", uniform: bool = False, layer=None):
    """One layer's mixture of experts: x [B, T, D] -> (y [B, T, D], router logits float32 [N, E]).

    With `layer` the feed-forward weights in `experts` are those of all layers, stacked; its router is one layer's.
    """
    B, T, D = x_BTD.shape
    x_ND = x_BTD.reshape(B * T, D)
    router_ED, bias_E = _router_rows(experts)
    logits_NE = router.router_logits(x_ND, router_ED, bias_E)
    E = logits_NE.shape[-1]
    routing = router.route_uniform(logits_NE) if uniform else router.route(logits_NE, min(top_k or E, E))
    if dispatch == "sparse" and current_mesh() is not None:
        return sparse_on_mesh(x_ND, routing, experts).reshape(B, T, D), logits_NE
    return DISPATCH[dispatch](x_ND, routing, experts, layer).reshape(B, T, D), logits_NE


class FlexMoE(nn.Module):
    """The decoder as a Flax module, used purely: `init(key, tokens)["params"]` is the tree, `apply` is `forward`.

    Initial values are folded from each leaf's owner and name: adding an expert leaves every other leaf as it was.
    """

    config: ModelConfig
    experts: tuple[str, ...] = (PUBLIC,)

    @nn.compact
    def __call__(self, tokens_BT, **kwargs) -> Output:
        trunk = _Owner(owner_spec(self.config, TRUNK), name="trunk")()
        experts = _Experts(self.config, self.experts, name="experts")()
        return forward(self.config, {"trunk": trunk, "experts": experts}, tokens_BT, **kwargs)


def init_params(config: ModelConfig, key, experts: tuple[str, ...] = (PUBLIC,)) -> Params:
    """Fresh float32 parameters (named form) of a model with these experts."""
    return FlexMoE(config, experts).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class _Experts(nn.Module):
    config: ModelConfig
    names: tuple[str, ...]

    @nn.compact
    def __call__(self) -> Params:
        return {name: _Owner(owner_spec(self.config, name), name=name)() for name in canonical_order(self.names)}


class _Owner(nn.Module):
    """Declares the leaves of one owner, nested as their paths say."""

    spec: dict[str, LeafSpec]

    @nn.compact
    def __call__(self) -> Params:
        groups: dict[str, dict[str, LeafSpec]] = {}
        leaves: Params = {}
        for path, leaf in self.spec.items():
            group, _, name = path.rpartition("/")
            if group:
                groups.setdefault(group, {})[name] = leaf
            else:
                leaves[name] = self.param(name, _initializer(leaf), leaf.shape, jnp.float32)
        return leaves | {group: _Owner(spec, name=group)() for group, spec in groups.items()}


def _initializer(leaf: LeafSpec):
    return nn.initializers.normal(leaf.std) if leaf.std else nn.initializers.constant(leaf.value)


def _router_rows(experts):
    """Router [E, D] and bias [E] of one layer. Named experts' rows are gathered here: E*D numbers, no FFN weights."""
    if is_stacked(experts):
        return experts["router"], experts["bias"]
    order = canonical_order(experts)
    return jnp.stack([experts[n]["router"] for n in order]), jnp.stack([experts[n]["bias"] for n in order])


def _before(config: ModelConfig, x_BTD, weight):
    return rms_norm(x_BTD, weight, config.norm_eps) if config.pre_norm else x_BTD


def _after(config: ModelConfig, y_BTD, weight):
    return y_BTD if config.pre_norm else rms_norm(y_BTD, weight, config.norm_eps)
