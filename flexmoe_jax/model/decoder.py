"""The FlexMoE decoder: `block` is the architecture, three drivers run it, and a Flax module declares its parameters.

    h = h + norm_attn(attention(h));  h = h + norm_ffn(moe(h))        (OLMo-2: the norm is on the branch's output)

With `pre_norm` the norms are on the branches' inputs (Llama). Layers are scanned: the first axis of every leaf of
`blocks` and of each expert is the layer. Source: FlexOlmo, arXiv 2507.07024, section 3.1.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexmoe_jax.model import attention, cache, router
from flexmoe_jax.model.expert_parallel import sparse_on_mesh
from flexmoe_jax.model.experts import dense, is_stacked, sparse
from flexmoe_jax.model.loss import head_product
from flexmoe_jax.model.norm import rms_norm
from flexmoe_jax.model.products import from_bits, matmul
from flexmoe_jax.model.rope import of_layer, rope_table
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.mesh import split_batch, splits_work
from flexmoe_jax.parallel.stacked import STACKED, with_stacked_rows
from flexmoe_jax.params import FFN_WEIGHTS, HEAD_LEAVES, Leaf, owner_leaves
from flexmoe_jax.tree import PUBLIC, TRUNK, Params, canonical_order


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a model runs: hashable, the static argument of compiled functions.

    `top_k` None runs every expert; `uniform` ignores the router and weights all experts equally. `dispatch` is `dense`
    (every expert on every token) or `sparse` (only the chosen experts; needs stacked experts). Activations are in
    `dtype`; norms, softmax, router and logits in float32 (model/precision.py). `remat` recomputes each layer in the
    backward pass: activations take the memory of a layer's inputs, for a third more computation.
    """

    config: ModelConfig
    top_k: int | None = None
    dispatch: str = "dense"
    uniform: bool = False
    dtype: str = "float32"
    remat: bool = False

    def active(self, experts: int) -> int:
        """Experts active per token of a model that has `experts` of them."""
        return min(self.top_k or experts, experts)

    def route(self, logits_NE: jax.Array) -> router.Routing:
        """Router logits float32 [..., E] -> the experts of each token and their weights."""
        if self.uniform:
            return router.route_uniform(logits_NE)
        return router.route(logits_NE, self.active(logits_NE.shape[-1]), self.config.norm_topk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Logits and router logits, both float32; N = B*T, experts in canonical order."""

    logits_BTV: jax.Array
    router_logits_LNE: jax.Array


def block(run: Decoder, layer: Params, x_BTD: jax.Array, rope: tuple, attend: Callable, mix: Callable) -> tuple:
    """One layer: x [B, T, D] -> (x, what `attend` keeps, router logits float32 [N, E]).

    Only `attend(q, k, v)` -> (heads [B, T, H, K], kept) and `mix(x)` -> (x, router logits) differ between whole
    sequences, prefill and decoding.
    """
    qkv = attention.project_qkv(run.config, layer, _before(run.config, x_BTD, layer["attn_norm"]), rope)
    y_BTHK, kept = attend(*qkv)
    x_BTD = x_BTD + _after(run.config, attention.project_out(layer, y_BTHK), layer["attn_norm"])
    y_BTD, logits_NE = mix(_before(run.config, x_BTD, layer["ffn_norm"]))
    return split_batch(x_BTD + _after(run.config, y_BTD, layer["ffn_norm"])), kept, logits_NE


def hidden_states(
    run: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    first_apart: bool = False,
    mix: Callable | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Whole sequences: int32 tokens [B, T] -> (x [B, T, D] for the head, router logits float32 [L, N, E]).

    x is the hidden state after the last norm; of a model whose owners change the output head it is wider, by what these
    changes take (`_for_head`).

    `params` is the whole tree with experts named or stacked (parallel/stacked.py). `segments_BT` int32 numbers the
    packed documents of a row: a token attends only within its own document. `positions_BT` int32 defaults to 0 to T-1.
    `first_apart` keeps the first layer out of the scan, which differentiates all its layers alike: with a frozen trunk
    nothing below the first layer's expert needs a derivative. It costs a copy of the other layers' weights. `mix`, in
    the place of `moe`, runs a layer's experts; what it returns beside their output takes the router logits' place.
    """
    segments_BT = jnp.zeros_like(tokens_BT) if segments_BT is None else segments_BT
    rope = rope_table(run.config, _positions(tokens_BT) if positions_BT is None else positions_BT)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array):
        return attention.attend_documents(q, k, v, segments_BT), None

    def body(x_BTD, layer_and_experts):
        layer, experts, index = layer_and_experts
        turn = of_layer(run.config, rope, index)
        x_BTD, _, logits_NE = block(run, layer, x_BTD, turn, attend, functools.partial(mix or moe, run, experts))
        return x_BTD, logits_NE

    body = jax.checkpoint(body, prevent_cse=False) if run.remat else body
    x_BTD = _embed(run, params, tokens_BT)
    layers = (params["trunk"]["blocks"], _scanned_experts(params), jnp.arange(run.config.num_layers))
    first_NE = None
    if first_apart:
        x_BTD, first_NE = body(x_BTD, jax.tree.map(lambda leaf: leaf[0], layers))
        layers = jax.tree.map(lambda leaf: leaf[1:], layers)
    x_BTD, logits_LNE = jax.lax.scan(body, x_BTD, layers)
    if first_NE is not None:
        logits_LNE = jnp.concatenate([first_NE[None], logits_LNE])
    return _for_head(run, params, x_BTD, logits_LNE), logits_LNE


def prefill(run: Decoder, params: Params, tokens_BT: jax.Array, length: int) -> tuple[jax.Array, Params]:
    """Prompts: int32 tokens [B, T] -> (x [B, T, D] for the head, key/value cache of `length` positions)."""
    rope, segments_BT = rope_table(run.config, _positions(tokens_BT)), jnp.zeros_like(tokens_BT)
    scanned, whole = _experts_to_read(run, params)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array):
        return attention.attend_documents(q, k, v, segments_BT), cache.layer_of(k, v, length)

    def body(x_BTD, layer_and_experts):
        layer, experts, index = layer_and_experts
        turn = of_layer(run.config, rope, index)
        x_BTD, kept, logits_NE = block(run, layer, x_BTD, turn, attend, _mix_in_place(run, experts, whole, index))
        return x_BTD, (kept, logits_NE)

    layers = (params["trunk"]["blocks"], scanned, jnp.arange(run.config.num_layers))
    x_BTD, (kept, logits_LNE) = jax.lax.scan(body, _embed(run, params, tokens_BT), layers)
    return _for_head(run, params, x_BTD, logits_LNE), kept


def decode(
    run: Decoder, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, kv_cache: Params
) -> tuple[jax.Array, Params]:
    """Further tokens: int32 tokens [B, T] at int32 `positions_BT` of the cache -> (x [B, T, D], the new cache).

    A token attends to the cache up to its own position; x is as of `prefill`.
    """
    rope = rope_table(run.config, positions_BT)
    scanned, whole = _experts_to_read(run, params)

    def body(x_BTD_and_cache, layer_and_experts):
        (x_BTD, kv_cache), (layer, experts, index) = x_BTD_and_cache, layer_and_experts

        def attend(q: jax.Array, k: jax.Array, v: jax.Array):
            kept = cache.write(kv_cache, index, k, v, positions_BT)
            keys, values = (kept[name][index].astype(q.dtype) for name in ("k", "v"))
            return attention.attend(q, keys, values, attention.cache_mask(positions_BT, keys.shape[2])), kept

        turn = of_layer(run.config, rope, index)
        x_BTD, kv_cache, logits_NE = block(run, layer, x_BTD, turn, attend, _mix_in_place(run, experts, whole, index))
        return (x_BTD, kv_cache), logits_NE

    layers = (params["trunk"]["blocks"], scanned, jnp.arange(run.config.num_layers))
    (x_BTD, kv_cache), logits_LNE = jax.lax.scan(body, (_embed(run, params, tokens_BT), kv_cache), layers)
    return _for_head(run, params, x_BTD, logits_LNE), kv_cache


def forward(run: Decoder, params: Params, tokens_BT: jax.Array, **kwargs) -> Output:
    """Whole sequences: int32 tokens [B, T] -> `Output`; `kwargs` are those of `hidden_states`."""
    x_BTD, router_logits_LNE = hidden_states(run, params, tokens_BT, **kwargs)
    return Output(logits(run, params, x_BTD), router_logits_LNE)


def logits(run: Decoder, params: Params, x_D: jax.Array) -> jax.Array:
    """Hidden states [..., D], as `hidden_states` returns them -> float32 logits [..., V]."""
    parts = [w.astype(x_D.dtype) for w in head(run.config, params)]
    return head_product(x_D, parts)


def head(config: ModelConfig, params: Params) -> tuple[jax.Array, ...]:
    """The output matrix [D, V], which is the transposed embedding if the model ties them; and where owners change it,
    their B with their biases as further rows, [sum of r + 1, V]."""
    trunk, experts = params["trunk"], params["experts"]
    whole = from_bits(trunk["embed"]).T if config.tie_embeddings else from_bits(trunk["head"])
    rows = [row for n in _with_heads(experts) for row in (experts[n]["head_b"], experts[n]["head_bias"][None])]
    return (whole, jnp.concatenate(rows)) if rows else (whole,)


def moe(run: Decoder, experts: Params, x_BTD: jax.Array, layer: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """One layer's mixture of experts: x [B, T, D] -> (y [B, T, D], router logits float32 [N, E]).

    `experts` are those of one layer, named or stacked. With `layer`, an index, the feed-forward weights in `experts`
    are those of all layers, stacked; router rows and biases are still those of one layer.
    """
    B, T, D = x_BTD.shape
    x_ND = x_BTD.reshape(B * T, D)
    router_ED, bias_E = _router_rows(experts)
    logits_NE = router.router_logits(x_ND, router_ED, bias_E)
    routing = run.route(logits_NE)
    mixture = dense if run.dispatch == "dense" else sparse_on_mesh if splits_work() else sparse
    return mixture(x_ND, routing, experts, layer).reshape(B, T, D), logits_NE


class FlexMoE(nn.Module):
    """The decoder as a Flax module: `init(key, tokens)["params"]` is the parameter tree, `apply` is `forward`.

    The key of each leaf is folded from its owner and name: adding an expert changes no other leaf. `place`, (path,
    leaf) -> leaf, puts each leaf on the devices as soon as it is drawn.
    """

    config: ModelConfig
    experts: tuple[str, ...] = (PUBLIC,)
    place: Callable[[str, jax.Array], jax.Array] = lambda path, leaf: leaf

    @nn.compact
    def tree(self) -> Params:
        """The parameters, named."""
        trunk = _Owner(owner_leaves(self.config, TRUNK), self.place, name="trunk")()
        return {"trunk": trunk, "experts": _Experts(self.config, self.experts, self.place, name="experts")()}

    def __call__(self, tokens_BT: jax.Array, **kwargs) -> Output:
        return forward(Decoder(self.config), self.tree(), tokens_BT, **kwargs)


def init_params(
    config: ModelConfig,
    key: jax.Array,
    experts: tuple[str, ...] = (PUBLIC,),
    place: Callable[[str, jax.Array], jax.Array] = lambda path, leaf: leaf,
) -> Params:
    """Initial float32 parameters (named form) of a model with these experts.

    Each leaf is drawn whole, on any number of devices: the same key gives the same bits on any mesh. `place`, (path,
    leaf) -> leaf, then puts it on the mesh, so that no device holds more than one whole leaf.
    """
    return FlexMoE(config, experts, place).init(key, method="tree")["params"]


class _Experts(nn.Module):
    config: ModelConfig
    names: tuple[str, ...]
    place: Callable[[str, jax.Array], jax.Array]

    @nn.compact
    def __call__(self) -> Params:
        order = canonical_order(self.names)
        return {name: _Owner(owner_leaves(self.config, name), self.place, name=name)() for name in order}


class _Owner(nn.Module):
    """Declares the leaves of one owner, nested by their paths."""

    leaves: dict[str, Leaf]
    place: Callable[[str, jax.Array], jax.Array]

    @nn.compact
    def __call__(self) -> Params:
        groups: dict[str, dict[str, Leaf]] = {}
        made: Params = {}
        for path, leaf in self.leaves.items():
            group, _, name = path.rpartition("/")
            if group:
                groups.setdefault(group, {})[name] = leaf
            else:
                made[name] = self.param(name, self._draw, name, leaf)
        return made | {group: _Owner(leaves, self.place, name=group)() for group, leaves in groups.items()}

    def _draw(self, key: jax.Array, name: str, leaf: Leaf) -> jax.Array:
        draw = nn.initializers.normal(leaf.std) if leaf.std else nn.initializers.constant(leaf.value)
        return self.place("/".join((*self.path, name)), draw(key, leaf.shape, jnp.float32))


def _embed(run: Decoder, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return split_batch(from_bits(params["trunk"]["embed"][tokens_BT]).astype(run.dtype))


def _for_head(run: Decoder, params: Params, x_BTD: jax.Array, logits_LNE: jax.Array) -> jax.Array:
    """x [B, T, D] of the last layer -> what the rows of `head` are multiplied by: x after the last norm, and for every
    owner i that changes the output head [g_i x A_i, g_i], r + 1 further numbers.

    The gate g is the softmax over all experts of the router's logits, mean over layers: pairwise odds survive a merge,
    and where the public expert takes a token no owner changes its head.
    """
    experts = params["experts"]
    x_BTD = rms_norm(x_BTD, params["trunk"]["final_norm"], run.config.norm_eps)
    if not (owners := _with_heads(experts)):
        return x_BTD
    order = canonical_order(name for name in experts if name != STACKED)
    mean_NE = jnp.zeros_like(logits_LNE[0]) if run.uniform else logits_LNE.mean(0)
    gate_BTE = jax.nn.softmax(mean_NE, axis=-1).reshape(*x_BTD.shape[:-1], -1).astype(x_BTD.dtype)
    parts = [x_BTD]
    for name in owners:
        gate_BT1 = gate_BTE[..., order.index(name), None]
        parts += [gate_BT1 * matmul(x_BTD, experts[name]["head_a"].astype(x_BTD.dtype), x_BTD.dtype), gate_BT1]
    return jnp.concatenate(parts, axis=-1)


def _with_heads(experts: Params) -> tuple[str, ...]:
    """The experts that change the output head, in canonical order."""
    return canonical_order(name for name in experts if name != STACKED and "head_a" in experts[name])


def _positions(tokens_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)


def _scanned_experts(params: Params) -> Params:
    """The experts in a form that can be scanned over layers: named, or every leaf stacked."""
    experts = params["experts"]
    if STACKED in experts:
        return with_stacked_rows(experts)
    return {n: {k: leaf for k, leaf in leaves.items() if k not in HEAD_LEAVES} for n, leaves in experts.items()}


def _experts_to_read(run: Decoder, params: Params) -> tuple[Params, Params]:
    """(experts that are scanned over layers, feed-forward weights of all layers that are read in place).

    A scan copies each layer's slice of its inputs: the weights of all experts, although decoding reads only a few.
    """
    experts = _scanned_experts(params)
    if run.dispatch == "dense" or not is_stacked(experts) or splits_work():
        return experts, {}
    whole = {name: experts[name] for name in FFN_WEIGHTS}
    return {name: leaf for name, leaf in experts.items() if name not in whole}, whole


def _mix_in_place(run: Decoder, experts: Params, whole: Params, index: jax.Array) -> Callable:
    return functools.partial(moe, run, {**experts, **whole}, layer=index if whole else None)


def _router_rows(experts: Params) -> tuple[jax.Array, jax.Array]:
    """Router [E, D] and bias [E] of one layer. Rows of named experts are stacked here: E*D numbers, no FFN weights."""
    if is_stacked(experts):
        return experts["router"], experts["bias"]
    order = canonical_order(experts)
    return jnp.stack([experts[n]["router"] for n in order]), jnp.stack([experts[n]["bias"] for n in order])


def _before(config: ModelConfig, x_BTD: jax.Array, weight_D: jax.Array) -> jax.Array:
    return rms_norm(x_BTD, weight_D, config.norm_eps) if config.pre_norm else x_BTD


def _after(config: ModelConfig, y_BTD: jax.Array, weight_D: jax.Array) -> jax.Array:
    return y_BTD if config.pre_norm else rms_norm(y_BTD, weight_D, config.norm_eps)
