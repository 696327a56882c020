"""The optimizer and its schedule, by Optax."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

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
    if config.optim_dtype == "bfloat16":
        rule = bfloat16_moments(rule)
    return optax.chain(clip_by_global_norm(config.max_grad_norm), rule)


def bfloat16_moments(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same rule, its moments stored in bfloat16 and computed in float32.

    A moment that moves by less than bfloat16 resolves, as Adam's second does in every step, would stand still if it
    were rounded to nearest. It is rounded up or down at random instead, right in the mean; the low bits of the
    gradients, which nothing else depends on, are the noise.
    """

    def narrow(state: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_moment(x) else x, state)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_moment(x) else x, state)
        updates, wide = rule.update(grads, wide, params)
        rounded = optax.tree.map_params(rule, lambda x, g: _round_by(x, g) if _is_moment(x) else x, wide, grads)
        return updates, rounded

    return optax.GradientTransformation(lambda params: narrow(rule.init(params)), update)


def _is_moment(x: PyTree) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _round_by(x: Float[Array, "..."], noise: Float[Array, "..."]) -> Array:
    """To bfloat16, up with the probability of what is cut off; ``noise`` has the shape of ``x``."""
    as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint32)
    draw = (as_bits(noise) * jnp.uint32(2654435761)) >> 16  # Knuth's multiplicative hash spreads the low bits
    bits = (as_bits(x) + draw) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Optax's, as one product with one number: its quotients cost a pass of their own over all gradients."""

    def clip(grads: PyTree, params: PyTree) -> PyTree:
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(grads), 1e-30))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)
