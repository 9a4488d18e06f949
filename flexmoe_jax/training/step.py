"""The training step: pure and jitted; it differentiates only the trainable leaves."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.pipeline import Batch
from flexmoe_jax.model.decoder import Decoder, head, hidden_states
from flexmoe_jax.model.loss import next_token_loss
from flexmoe_jax.model.products import as_bits, cpu_form
from flexmoe_jax.model.router import route
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.parallel.mesh import current_mesh, platform
from flexmoe_jax.parallel.specs import batch_parts, path_text
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.params import HEAD_LEAVES, is_matrix
from flexmoe_jax.training.optimizer import learning_rate, make_optimizer
from flexmoe_jax.training.state import TrainState
from flexmoe_jax.tree import Params, combine, flatten

# Tokens of a microbatch on a CPU: its activations stay in the cache, and take a part of the memory.
CPU_TOKENS = 1024


def make_train_step(
    model: ModelConfig, run: RunConfig, shardings: Any = None, optimizer: optax.GradientTransformation | None = None
) -> Callable:
    """Returns jitted `step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    `shardings` are (those of the state, that of the metrics), for a step that is called inside `jax.set_mesh`, as this
    function is. Without an `optimizer` it is the run's. `batch` is a `data.pipeline.Batch` of [batch_size, seq_len],
    which is cut into `microbatches(run)`. Losses are sums over weighted tokens divided by the weights of the whole
    batch, not means over microbatches. A step whose loss or gradient is not finite changes neither parameters nor
    moments, and is counted. Metrics are scalars, `share` [L, E], the mean routed weight of each expert in canonical
    order, and where public text is mixed in `router_accuracy` [L]; `grad_norms` and `update_norms` hold a norm for each
    kind of parameter (`kind_of`).
    """
    optimizer, schedule = optimizer or make_optimizer(run.optimizer, run.steps), learning_rate(run.optimizer, run.steps)
    count = microbatches(run)
    grads_of = jax.grad(functools.partial(_losses, model, run), has_aux=True)

    def step(state: TrainState, frozen: Params, batch: Batch):
        totals = {"all": batch.weights.sum()}
        if batch.own is not None:
            totals |= {"own": (batch.weights * batch.own).sum()}
        totals = jax.tree.map(lambda total: jnp.maximum(total, 1.0), totals)
        micro = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        used = _as_used(state.trainable, jnp.dtype(run.compute_dtype))
        kept = jax.tree_util.tree_map_with_path(_as_kept, frozen)

        def gradients(microbatch):
            grads, metrics = grads_of(used, kept, microbatch, totals)
            return jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, state.trainable), metrics

        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, gradients(microbatch)), None

        first = gradients(jax.tree.map(lambda x: x[0], micro))
        rest = jax.tree.map(lambda x: x[1:], micro)
        (grads, metrics), _ = jax.lax.scan(accumulate, first, rest) if count > 1 else (first, None)

        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        updates = _project(updates, state.trainable)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        updates_made = state.step - state.skipped
        metrics |= {"grad_norm": grad_norm, "lr": schedule(updates_made), "tokens": batch.weights.sum()}
        metrics |= {"grad_norms": _norms(grads), "update_norms": _norms(updates)}
        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            trainable=keep(optax.apply_updates(state.trainable, updates), state.trainable),
            opt_state=keep(opt_state, state.opt_state),
            bad_steps=(state.bad_steps + bad) * bad,
            skipped=state.skipped + bad,
        )
        return state, metrics | {"bad_steps": state.bad_steps, "skipped": state.skipped}

    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def microbatches(run: RunConfig) -> int:
    """The number of microbatches of a step on the surrounding mesh: `config.accumulation`, or if that is None a choice.

    On a CPU it is the fewest whose part on a device has at most `CPU_TOKENS` tokens, or one sequence. Elsewhere, and
    with a load-balance loss, which depends on it, it is 1.
    """
    if run.accumulation is not None:
        return run.accumulation
    if run.load_balance or platform() != "cpu":
        return 1
    mesh = current_mesh()
    parts = 1 if mesh is None else batch_parts(mesh)
    counts = [n for n in range(1, run.batch_size + 1) if run.batch_size % (n * parts) == 0]
    small = [n for n in counts if run.batch_size // (n * parts) * run.seq_len <= CPU_TOKENS]
    return min(small, default=max(counts, default=1))


def _project(updates: Params, trainable: Params) -> Params:
    """The updates, of which those of router biases b end at b <= 0: the model uses min(b, 0), so what is kept acts.

    Only here does the bound act on training. The derivative of the loss does not know it (`negative_part`): the
    gradients of microbatches add up to that of the batch also where biases are at the bound, as all are at the start.
    """

    def at_most_0(path, update, leaf):
        return jnp.minimum(update, -leaf) if path[-1].key == "bias" else update

    return jax.tree_util.tree_map_with_path(at_most_0, updates, trainable)


def kind_of(path: str) -> str:
    """The kind of the parameter at `path`: what norms of gradients and updates are taken over."""
    leaf = path.rpartition("/")[2]
    kinds = {"router": "rows", "bias": "biases", "embed": "embeddings", "head": "embeddings"}
    kinds |= dict.fromkeys(HEAD_LEAVES, "head changes")
    return kinds.get(leaf) or (
        "matrices" if is_matrix(path) else "norms" if leaf.endswith("norm") else "attention biases"
    )


def _norms(tree: Params) -> dict[str, jax.Array]:
    """{kind of parameter: L2 norm of its leaves together}."""
    kinds: dict[str, list[jax.Array]] = {}
    for path, leaf in flatten(tree).items():
        kinds.setdefault(kind_of(path), []).append(leaf)
    return {kind: optax.tree.norm(leaves) for kind, leaves in kinds.items()}


def _as_used(trainable: Params, dtype: jnp.dtype) -> Params:
    """The leaves with matrices cast, once per step, to the `dtype` in which the model multiplies them.

    Gradients of a microbatch then have this dtype too; in bfloat16 they take half the memory. Their sum is float32.
    On a CPU they stay float32 until the product, which casts a layer at a time while it is in the cache.
    """
    if cpu_form():
        return trainable

    def cast(path, leaf):
        return leaf.astype(dtype) if is_matrix(path[-1].key) else leaf

    return jax.tree_util.tree_map_with_path(cast, trainable)


def _as_kept(path: tuple, leaf: jax.Array) -> jax.Array:
    """A frozen leaf in the form in which the model takes it: matrices may be bits (model/products.py)."""
    name = path_text(path)
    return as_bits(leaf) if is_matrix(name) or name.endswith(("embed", "head")) else leaf


def decoder_of(model: ModelConfig, run: RunConfig, stacked: bool = False) -> Decoder:
    """How the model runs in a step of `run`; `stacked` experts are run sparsely."""
    return Decoder(model, run.top_k, "sparse" if stacked else "dense", dtype=run.compute_dtype, remat=run.remat)


def _losses(
    model: ModelConfig,
    run: RunConfig,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    totals: dict[str, jax.Array],
) -> tuple[jax.Array, dict]:
    """One microbatch's part of the whole batch's mean loss, and its parts of the metrics.

    Cross-entropy + `z_loss` * logsumexp(logits)^2 + `router_z_loss` * logsumexp(router logits)^2 (mean over layers).
    """
    params = combine(trainable, frozen)
    decoder = decoder_of(model, run, STACKED in params["experts"])
    # On a CPU this saves a part of a step, for a copy of the weights.
    first_apart = not run.is_public and platform() == "cpu"
    x_BTD, router_logits_LNE = hidden_states(decoder, params, batch.tokens, batch.segments, first_apart=first_apart)
    weights_BT = batch.weights / totals["all"]
    total, nll_BT, log_z_BT = next_token_loss(x_BTD, head(model, params), batch.targets, weights_BT, run.z_loss)
    weights_N = weights_BT.reshape(-1)
    router_z = (weights_N * jax.nn.logsumexp(router_logits_LNE, axis=-1) ** 2).sum(-1).mean()
    probs_LNE = route(router_logits_LNE, router_logits_LNE.shape[-1]).weights_NE
    entropy = -(weights_N * jax.scipy.special.xlogy(probs_LNE, probs_LNE).sum(-1)).sum(-1).mean()
    total = total + run.router_z_loss * router_z
    metrics = {
        "loss": (weights_BT * nll_BT).sum(),
        "z_loss": (weights_BT * log_z_BT**2).sum(),
        "router_z_loss": router_z,
        "router_entropy": entropy,
        "share": (weights_N[:, None] * probs_LNE).sum(1),
    }
    if batch.own is not None:
        metrics |= _by_source(nll_BT, router_logits_LNE, batch, totals)
    if run.load_balance:
        balance = _balance(router_logits_LNE, weights_N, run.top_k)
        total, metrics = total + run.load_balance * balance, metrics | {"load_balance": balance}
    if run.router_contrast:
        assert batch.own is not None  # RunConfig refuses the run without public text
        contrast = _contrast(router_logits_LNE, batch.weights, batch.own, totals)
        total, metrics = total + run.router_contrast * contrast, metrics | {"router_contrast": contrast}
    return total, metrics


def _balance(router_logits_LNE: jax.Array, weights_N: jax.Array, top_k: int | None) -> jax.Array:
    """E * sum over experts of (share of tokens' choices) * (mean probability), mean over layers; 1 when balanced.

    Fedus et al., Switch Transformers, arXiv 2101.03961, equation 4, with choices counted over all k. Computed over a
    microbatch; `weights_N` sum to its part of the batch.
    """
    E, part = router_logits_LNE.shape[-1], weights_N.sum()
    weights_N1 = (weights_N / jnp.maximum(part, jnp.finfo(jnp.float32).tiny))[:, None]
    chosen_LNE = route(router_logits_LNE, top_k or E).weights_NE > 0
    share_LE = (weights_N1 * chosen_LNE / min(top_k or E, E)).sum(1)
    probs_LE = (weights_N1 * jax.nn.softmax(router_logits_LNE, axis=-1)).sum(1)
    return part * E * (share_LE * probs_LE).sum(-1).mean()


def _contrast(
    router_logits_LNE: jax.Array, weights_BT: jax.Array, own_BT: jax.Array, totals: dict[str, jax.Array]
) -> jax.Array:
    """Cross-entropy of every layer's router as a classifier "the owner's text or public text?", mean over layers.

    Own and public tokens have half of the weight each. The log-odds of {public, owner} are the difference of their two
    logits, and merging keeps pairwise odds.
    """
    share_BT = halves(weights_BT, own_BT, totals)
    return (share_BT.reshape(-1) * jax.nn.softplus(-_signed_odds(router_logits_LNE, own_BT))).sum(-1).mean()


def halves(weights_BT: jax.Array, own_BT: jax.Array, totals: dict[str, jax.Array]) -> jax.Array:
    """Weights of which the whole batch's own and public tokens have half each, for any numbers of them."""
    public_total = jnp.maximum(totals["all"] - totals["own"], 1.0)
    return weights_BT * jnp.where(own_BT > 0, 0.5 / totals["own"], 0.5 / public_total)


def _signed_odds(router_logits_LNE: jax.Array, own_BT: jax.Array) -> jax.Array:
    """The log-odds [L, N] of {public, owner}: those of the owner in rows of its text, of public in the others."""
    odds_LN = router_logits_LNE[..., 1] - router_logits_LNE[..., 0]
    return jnp.where(own_BT > 0, 1.0, -1.0).reshape(-1) * odds_LN


def _by_source(
    nll_BT: jax.Array, router_logits_LNE: jax.Array, batch: Batch, totals: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """`own_loss` and `public_loss`, nats per token; with two experts `router_accuracy` [L], the share of tokens whose
    odds are right, own and public tokens having half of the weight each."""
    assert batch.own is not None
    halves_BT = halves(batch.weights, batch.own, totals)
    found = {
        "own_loss": 2 * (halves_BT * batch.own * nll_BT).sum(),
        "public_loss": 2 * (halves_BT * (1 - batch.own) * nll_BT).sum(),
    }
    if router_logits_LNE.shape[-1] == 2:
        right_LN = _signed_odds(router_logits_LNE, batch.own) > 0
        found["router_accuracy"] = (halves_BT.reshape(-1) * right_LN).sum(-1)
    return found
