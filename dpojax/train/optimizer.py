"""The optimizer and its schedule, by Optax."""

import optax

from dpojax.configs import TrainOptions


def make_schedule(config: TrainOptions, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup that is above 0 from the first step on, then constant, linear or cosine.

    The warmup is the original DPO repository's: ``(step + 1) / (warmup_steps + 1)`` of the peak.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, total_steps - warmup)
    after = {
        "constant_with_warmup": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.lr_scheduler_type]
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def make_optimizer(config: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by global norm, then RMSprop (torch's: decay 0.99, no momentum, epsilon outside the root) or AdamW."""
    if config.optim == "rmsprop":
        rule = optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False)
    else:
        rule = optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
