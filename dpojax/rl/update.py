"""How samples become updates: a method's losses, and the optimizer's steps on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from dpojax.rl.objectives import (
    gae,
    leave_one_out,
    ppo_loss,
    rloo_loss,
    shaped_rewards,
    token_mask,
    token_rewards,
    value_loss,
)
from dpojax.rl.rollout import Rollouts
from dpojax.train import TrainState
from dpojax.train.objectives import Metrics
from dpojax.types import Metric, PyTree

UpdateFn = Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]
OfTokens = Callable[[PyTree, Rollouts], Float[Array, "B n C"]]
"""A number of every token of the samples, under these parameters."""


@dataclasses.dataclass(frozen=True)
class RLOO:
    """REINFORCE whose baseline is the mean reward of a prompt's other samples (Ahmadian et al. 2024).

    ``updates`` is how often the same samples are used. From the second time on ``eps`` bounds the ratio of the policy
    to the one that drew them.
    """

    updates: int = 1
    eps: float = 0.2


@dataclasses.dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with a value model (Schulman et al. 2017; Ziegler et al. 2019).

    ``updates`` is how often the same samples are used. ``eps`` bounds the ratio of every token, and ``value_eps`` how
    far a value moves, in the rewards' unit. ``gamma`` and ``lam`` are those of :func:`~dpojax.rl.objectives.gae`.
    """

    updates: int = 4
    eps: float = 0.2
    value_eps: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95


Method = RLOO | PPO
METHODS: dict[str, type[RLOO] | type[PPO]] = {"rloo": RLOO, "ppo": PPO}


@struct.dataclass
class ActorCritic(TrainState):
    """A policy's train state, and that of its value model, with a learning rate of its own."""

    critic: TrainState | None = None


def actor_critic(actor: TrainState, critic: TrainState) -> ActorCritic:
    """Both states, or both states' shardings, as one."""
    fields = {field.name: getattr(actor, field.name) for field in dataclasses.fields(TrainState)}
    return ActorCritic(**fields, critic=critic)


def mean_of(losses: Float[Array, "B n"]) -> Metric:
    """The mean over all samples, undivided."""
    return Metric(jnp.sum(losses), jnp.float32(losses.size))


def descend(
    optimizer: optax.GradientTransformation, state: TrainState, loss: Callable[[PyTree], Metric]
) -> tuple[Any, Metrics]:
    """The state after one step of the optimizer on a loss of the parameters; the loss, and its gradient's norm."""

    def undivided(params: PyTree) -> tuple[Array, Metric]:
        metric = loss(dataclasses.replace(state, params=params).policy)
        return metric.sum, metric

    grads, metric = jax.grad(undivided, has_aux=True)(state.params)
    grads = jax.tree.map(lambda g: g / metric.weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: state.hyper.learning_rate * u, updates))
    metrics = {"loss": metric, "grad_norm": Metric(optax.tree.norm(grads), jnp.float32(1))}
    return dataclasses.replace(state, params=params, opt_state=opt_state), metrics


def make_rloo_update(method: RLOO, optimizer: optax.GradientTransformation, logps_of: OfTokens) -> UpdateFn:
    """``update(state, rollouts) -> (state, metrics)`` by RLOO, pure."""

    def update(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        shaped = shaped_rewards(rollouts.rewards, rollouts.logps, rollouts.ref_logps, state.hyper.beta)
        advantages = leave_one_out(shaped)

        def loss(params: PyTree) -> Metric:
            return mean_of(rloo_loss(logps_of(params, rollouts), rollouts.logps, advantages, method.eps))

        return repeated(lambda state: descend(optimizer, state, loss), state, method.updates)

    return update


def make_ppo_update(
    method: PPO, optimizer: optax.GradientTransformation, logps_of: OfTokens, values_of: OfTokens
) -> UpdateFn:
    """``update(state, rollouts) -> (state, metrics)`` by PPO, pure; the state is an :class:`ActorCritic`."""

    def update(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        assert isinstance(state, ActorCritic) and state.critic is not None
        old, mask = rollouts.logps, token_mask(rollouts.lengths, rollouts.tokens.shape[-1])
        rewards = token_rewards(rollouts.rewards, old, rollouts.ref_logps, rollouts.lengths, state.hyper.beta)
        old_values = values_of(state.critic.policy, rollouts)
        advantages = gae(rewards, old_values, mask, method.gamma, method.lam)
        returns = advantages + old_values

        def policy_loss(params: PyTree) -> Metric:
            return mean_of(ppo_loss(logps_of(params, rollouts), old, advantages, method.eps))

        def critic_loss(params: PyTree) -> Metric:
            return mean_of(value_loss(values_of(params, rollouts), old_values, returns, mask, method.value_eps))

        def once(state: ActorCritic) -> tuple[ActorCritic, Metrics]:
            assert state.critic is not None
            critic, of_values = descend(optimizer, state.critic, critic_loss)
            actor, metrics = descend(optimizer, state, policy_loss)
            return dataclasses.replace(actor, critic=critic), metrics | {"value_loss": of_values["loss"]}

        return repeated(once, state, method.updates)

    return update


def repeated(once: Callable[[Any], tuple[Any, Metrics]], state: Any, times: int) -> tuple[Any, Metrics]:
    """The state after so many updates with the same samples, and the sums of their metrics."""
    if times == 1:
        return once(state)
    state, metrics = jax.lax.scan(lambda state, _: once(state), state, length=times)
    return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


def with_figures(update: UpdateFn, schedule: optax.Schedule, updates: int) -> UpdateFn:
    """The update as one step of a run: the count goes on, and the samples' figures are among the metrics.

    ``kl`` is the mean over samples of the log-ratio to the reference, under the policy that drew them.
    """

    def step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        at, peak = state.step, state.hyper.learning_rate
        state, metrics = update(state, rollouts)
        rate = peak * jnp.asarray(schedule(at * updates), jnp.float32)
        figures = {
            "reward": rollouts.rewards.astype(jnp.float32),
            "kl": jnp.sum(rollouts.logps - rollouts.ref_logps, axis=-1),
            "completions/mean_length": rollouts.lengths.astype(jnp.float32),
            "completions/clipped_ratio": (~rollouts.ended).astype(jnp.float32),
        }
        metrics |= {name: mean_of(x) for name, x in figures.items()}
        metrics["learning_rate"] = Metric(rate, jnp.float32(1))
        return dataclasses.replace(state, step=at + 1), metrics

    return step
