"""AdamW with clipping, warm-up and cosine decay, from optax; optionally with moments that take less memory."""

import optax

from flexmoe_jax.optimizer_config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `lr`, then cosine decay to `end_lr_fraction * lr` at step `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, 1), config.lr * config.end_lr_fraction)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW with decoupled weight decay; for trainable leaves only.

    Moments are kept as `OptimizerConfig` says and computed in float32. The factored second moment is Adafactor's
    (Shazeer and Stern, arXiv 1804.04235).
    """
    clip, schedule = optax.clip_by_global_norm(config.clip_norm), learning_rate(config, steps)
    kept = None if config.first_moment == "float32" else config.first_moment
    if config.second_moment == "full":
        adamw = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=kept, weight_decay=config.weight_decay
        )
        return optax.chain(clip, adamw)
    return optax.chain(
        clip,
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, accumulator_dtype=kept) if config.b1 else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
