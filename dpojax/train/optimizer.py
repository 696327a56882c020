"""The optimizer and its schedule, by Optax."""

import jax
import jax.numpy as jnp
import optax

from dpojax.configs import TrainOptions
from dpojax.types import PyTree


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
    return optax.chain(clip_by_global_norm(config.max_grad_norm), rule)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Optax's, as one product with one number: its quotients cost a pass of their own over all gradients."""

    def clip(grads: PyTree, params: PyTree) -> PyTree:
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(grads), 1e-30))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)
