"""The optimizer and its schedule, by Optax."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dpojax.types import PyTree


def make_schedule(
    *,
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup",
    warmup_steps: int = 0,
    total_steps: int = 1,
) -> optax.Schedule:
    """Learning rate by step, relative to its peak: linear warmup that is above 0 from the first step on, then the rest.

    The warmup is the original DPO repository's: ``(step + 1) / (warmup_steps + 1)``.

    Args:
      lr_scheduler_type: after the warmup: constant, or linear or cosine to 0 at the last step.
      warmup_steps: steps of the warmup.
      total_steps: steps of the run, those of the warmup included.
    """
    rest = max(1, total_steps - warmup_steps)
    after = {
        "constant_with_warmup": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
    }[lr_scheduler_type]
    ramp = optax.linear_schedule(1 / (warmup_steps + 1), 1.0, warmup_steps)
    return optax.join_schedules([ramp, after], [warmup_steps]) if warmup_steps else after


def make_optimizer(
    schedule: optax.Schedule,
    *,
    optim: Literal["rmsprop", "adamw"] = "rmsprop",
    weight_decay: float = 0.0,
    max_grad_norm: float = 10.0,
    optim_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Clipping by global norm, then RMSprop (torch's: decay 0.99, no momentum, epsilon outside the root) or AdamW.

    Args:
      schedule: learning rate by step, relative to its peak (:func:`make_schedule`); the train step multiplies the
        updates by the peak.
      optim: the rule.
      weight_decay: decoupled, per unit of learning rate; AdamW only.
      max_grad_norm: gradients are scaled down to this global norm.
      optim_dtype: of the moments; bfloat16 is rounded stochastically.
    """
    if optim == "rmsprop":
        rule = optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False)
    else:
        rule = optax.adamw(schedule, weight_decay=weight_decay)
    if optim_dtype == "bfloat16":
        rule = bfloat16_moments(rule)
    return optax.chain(clip_by_global_norm(max_grad_norm), rule)


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
    """To bfloat16, up with a probability of the share that is cut off; ``noise`` has the shape of ``x``."""
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
