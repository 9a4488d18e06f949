"""AdamW with clipping, warm-up and cosine decay, from optax."""

import optax

from flexmoe_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `lr`, then cosine to `end_lr_fraction * lr` at `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, 1), config.lr * config.end_lr_fraction)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled weight decay. It only ever sees trainable leaves."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
