"""AdamW with clipping, schedules and parameter groups, from optax; optionally with moments that take less memory."""

import itertools
import logging
import math
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from flexmoe_jax.config import RunConfig
from flexmoe_jax.errors import ConfigError, FlexMoEError
from flexmoe_jax.optimizer_config import Group, OptimizerConfig
from flexmoe_jax.parallel.specs import path_text
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.training.freezing import freezing_mask
from flexmoe_jax.tree import Params, canonical_order, flatten, match_rules, partition

log = logging.getLogger(__name__)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `lr`, then the course that `config.schedule` names, to `end_lr_fraction * lr`.

    It takes `config.schedule_steps`, or `steps` where that is None; the rate then stays what it is at their end.
    """
    length = max(config.schedule_steps or steps, 1)
    warmup = min(config.warmup_steps, length - 1)
    peak, end = config.lr, config.lr * config.end_lr_fraction
    # optax's warm-up of 0 steps stays at 0.
    stable = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, length, end)
    if config.schedule == "constant":
        return stable
    if config.schedule == "wsd":
        decay = min(round(config.decay_share * length), length - warmup)
        return optax.join_schedules([stable, optax.linear_schedule(peak, end, decay)], [length - decay])
    starts = [round(i * length / config.cycles) for i in range(config.cycles + 1)]
    lengths = [after - start for start, after in itertools.pairwise(starts) if after > start]
    return optax.sgdr_schedule(
        {
            "init_value": 0.0,
            "peak_value": peak,
            "warmup_steps": min(warmup, part - 1) if i == 0 else 0,
            "decay_steps": part,
            "end_value": end,
        }
        for i, part in enumerate(lengths)
    )


def make_optimizer(config: OptimizerConfig, steps: int, experts: Iterable[str] = ()) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW with decoupled weight decay and the groups' factors; for trainable leaves only.

    Moments are kept as `OptimizerConfig` says and computed in float32. The factored second moment is Adafactor's
    (Shazeer and Stern, arXiv 1804.04235). `experts` are the names of all experts of the run: stacked leaves, which a
    mesh with an `expert` axis has, need them. The state does not depend on the groups. ConfigError as of `factors_of`,
    when it first sees the leaves.
    """
    by_group = _by_group(config, canonical_order(experts))
    clip, rate = optax.clip_by_global_norm(config.clip_norm), optax.scale_by_learning_rate(learning_rate(config, steps))
    kept = None if config.first_moment == "float32" else config.first_moment
    if config.second_moment == "full":
        adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=kept)
        return optax.chain(clip, optax.chain(adam, by_group, rate))
    return optax.chain(
        clip,
        optax.scale_by_factored_rms(),
        optax.stateless(lambda updates, _: _clip_by_rms(updates)),
        optax.ema(config.b1, accumulator_dtype=kept) if config.b1 else optax.identity(),
        by_group,
        rate,
    )


def _clip_by_rms(updates: Params) -> Params:
    """Updates with a root mean square of at most 1 in every leaf (Adafactor), of stacked experts in each one's part.

    `optax.clip_by_block_rms` would bound all experts of a stack together, and a mesh would change what a run trains.
    """

    def clip(path: tuple, update: jax.Array) -> jax.Array:
        stacked = f"/{STACKED}/" in path_text(path)
        axes = [axis for axis in range(update.ndim) if not (stacked and axis == 1)]
        return update / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True)))

    return jax.tree_util.tree_map_with_path(clip, updates)


def factors_of(config: OptimizerConfig, trained: Iterable[str]) -> dict[str, Group]:
    """{path: the group that decides it, with both its factors} of the paths of the leaves that are trained.

    Experts' leaves are known by their names (`experts/news/w_up`). ConfigError for a group that decides none of them,
    except the last, which is for all others.
    """
    paths, rules = list(trained), config.rules
    chosen = match_rules(paths, [(rule.pattern, rule) for rule in rules])
    for rule in rules[:-1]:
        if rule not in chosen.values():
            taken = [path for path in paths if re.fullmatch(rule.pattern, path)]
            why = f"earlier groups decide {', '.join(taken)}" if taken else f"trained are {', '.join(paths)}"
            raise ConfigError(
                f"the group {rule.pattern!r} of config.optimizer.groups decides no trained parameter: {why}",
                "correct the pattern, leave the group out, or give it before the others",
            )
    return {path: rule.of(path) for path, rule in chosen.items()}


def group_table(run: RunConfig, params: Params) -> list[tuple[Group, int, int]]:
    """(group with both factors, number of leaves, number of parameters) of what `run` trains of the whole tree.

    In the order in which the groups decide. ConfigError as of `factors_of`.
    """
    config = run.optimizer
    trainable, _ = partition(params, freezing_mask(params, run.owner, run.freeze))
    flat = flatten(trainable)
    sizes: dict[Group, tuple[int, int]] = {}
    for path, group in factors_of(config, flat).items():
        leaves, count = sizes.get(group, (0, 0))
        sizes[group] = leaves + 1, count + math.prod(flat[path].shape)
    order = [rule.pattern for rule in config.rules]
    return [(group, *size) for group, size in sorted(sizes.items(), key=lambda item: order.index(item[0].pattern))]


def log_optimizer(run: RunConfig, groups: list[tuple[Group, int, int]]) -> None:
    """Logs `groups`, the run's `group_table`, and the course of the learning rate."""
    config = run.optimizer
    for group, leaves, count in groups:
        factors = f"rate x {group.lr:g}, decay x {group.decay:g}"
        log.info(f"{factors:24} {group.pattern:18} {leaves:3} leaves {count:14,} parameters")
    length = config.schedule_steps or run.steps
    warmup = min(config.warmup_steps, length - 1)
    log.info(f"learning rate {config.lr:g}: {config.schedule} over {length:,} steps, {warmup:,} of them warm-up")
    if run.steps > length:
        end = float(learning_rate(config, length)(length))
        log.info(
            f"learning rate {end:g} from step {length:,} on, as at the end of its schedule; another schedule is asked "
            f"for by config.optimizer.schedule_steps={run.steps} and --allow=config.optimizer.schedule_steps"
        )


def _by_group(config: OptimizerConfig, experts: Sequence[str]) -> optax.GradientTransformation:
    """Adds each leaf's weight decay to its update, and scales both by its factor on the rate; without a state.

    Every expert of a stacked leaf has factors of its own.
    """

    def init(trainable: Params) -> optax.EmptyState:
        factors_of(config, (name for path in flatten(trainable) for name in _named(path, experts)))
        return optax.EmptyState()

    def scale(updates: Params, trainable: Params) -> Params:
        groups = factors_of(config, (name for path in flatten(trainable) for name in _named(path, experts)))

        def scaled(path: tuple, update: jax.Array, leaf: jax.Array) -> jax.Array:
            own = [groups[name] for name in _named(path_text(path), experts)]
            decay = _factor([config.weight_decay * (group.decay or 0.0) for group in own], leaf)
            rate = _factor([group.lr for group in own], leaf)
            return (update + decay * leaf) * rate

        return jax.tree_util.tree_map_with_path(scaled, updates, trainable)

    return optax.GradientTransformation(init, optax.stateless(scale).update)


def _named(path: str, experts: Sequence[str]) -> list[str]:
    """The paths of the leaves that `path` holds: itself, or of a stacked leaf that of each expert, in their order."""
    if f"/{STACKED}/" not in path:
        return [path]
    if not experts:
        raise FlexMoEError(f"the optimizer does not know whose {path} is", "give make_optimizer the experts' names")
    return [path.replace(f"/{STACKED}/", f"/{name}/") for name in experts]


def _factor(values: list[float], leaf: jax.Array) -> float | jax.Array:
    """The value, or of a stacked leaf [L, E, ...] whose experts' values differ [E, 1, ...]; empty slots get 1."""
    if len({*values}) == 1:
        return values[0]
    slots = [*values, *[1.0] * (leaf.shape[1] - len(values))]
    return jnp.asarray(slots, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 2))
