"""The program of policy gradients, compiled for a mesh, and its loop: samples, their rewards, an update, again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpojax.compiler import compiler_options
from dpojax.configs import ComputeOptions, MeshConfig
from dpojax.generate import pad_left
from dpojax.logprobs import completion_stats, completion_values
from dpojax.models import DecoderConfig, check_divides
from dpojax.rl.rollout import Reward, RolloutFn, Rollouts, make_rollout
from dpojax.rl.update import (
    RLOO,
    Method,
    UpdateFn,
    actor_critic,
    make_ppo_update,
    make_rloo_update,
    with_figures,
)
from dpojax.sharding import batch_sharding, batch_shards, make_mesh, replicated
from dpojax.train import TrainState, make_optimizer, make_schedule
from dpojax.train.objectives import Metrics
from dpojax.train.scoring import apply_on, place_params
from dpojax.train.state import StateLayout, state_layout
from dpojax.types import PyTree

OnStep = Callable[[int, TrainState, Metrics], Any]
"""``on_step(step, state, metrics)``, called after every step; returning False stops. The state's arrays live until the
next step: what is kept of them must be copied. The metrics stay on the devices until their ``mean`` is read."""


@dataclasses.dataclass(frozen=True)
class RLProgram:
    """The functions of a run of policy gradients, and the mesh that they run on.

    Attributes:
      mesh: the devices.
      config: shape of policy and reference.
      method: how samples become updates.
      layout: how the policy's train state looks and lies.
      critic: the same of PPO's value model; None for RLOO.
      rollout: samples of a policy, judged (:class:`~dpojax.rl.rollout.RolloutFn`).
      update: ``(state, rollouts) -> (state, metrics)``, jitted; the state is donated, the metrics are undivided.
      max_new_tokens: C, tokens of a sample at most.
    """

    mesh: Mesh
    config: DecoderConfig
    method: Method
    layout: StateLayout
    critic: StateLayout | None
    rollout: RolloutFn
    update: UpdateFn
    max_new_tokens: int


def make_rl_program(
    config: DecoderConfig,
    method: Method | None = None,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    num_samples: int = 4,
    mesh: Mesh | None = None,
    beta: float = 0.1,
    learning_rate: float | None = None,
    value_learning_rate: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    schedule: optax.Schedule | None = None,
    compute: ComputeOptions | None = None,
) -> RLProgram:
    """The program of a model and a method.

    Beta and the learning rates are inputs of the compiled functions, as they are of DPO's
    (:func:`~dpojax.train.with_hyper`).

    Args:
      config: shape of policy and reference.
      method: default: :class:`~dpojax.rl.update.RLOO`.
      max_new_tokens: C, tokens of a sample at most; one that is cut there is a sample like any other.
      eos_ids: tokens that end a sample.
      num_samples: n, samples of each prompt.
      mesh: default: all devices, each with a copy of the model.
      beta: strength of the KL penalty.
      learning_rate: the peak, by which the optimizer's updates are multiplied; default: 1e-6, or, with an optimizer
        of your own, 1.
      value_learning_rate: that of PPO's value model; default: the policy's.
      optimizer: of the policy, and again of the value model; default: Adam with gradients clipped to a norm of 1.
      schedule: learning rate by update, relative to the peak; what your own optimizer was built with, for the log.
      compute: dtype, attention kernel, chunks of logits, and what the backward pass recomputes.

    Raises:
      UserError: the mesh does not divide the model.
      ValueError: RLOO with one sample of a prompt, which it compares with the others.
    """
    method, mesh, compute = method or RLOO(), mesh or make_mesh(MeshConfig()), compute or ComputeOptions()
    check_divides(mesh, config)
    if isinstance(method, RLOO) and num_samples < 2:
        raise ValueError(f"num_samples {num_samples}: RLOO compares a prompt's samples; draw 2 or more")
    peak = learning_rate if learning_rate is not None else 1e-6 if optimizer is None else 1.0
    schedule = schedule or make_schedule()
    optimizer = optimizer or make_optimizer(schedule, optim="adamw", max_grad_norm=1.0)
    layout = state_layout(mesh, config, optimizer, beta=beta, learning_rate=peak)
    apply_fn, chunk = apply_on(config, mesh, compute, remat=compute.remat), compute.logprob_chunk_tokens

    def logps_of(params: PyTree, rollouts: Rollouts) -> Float[Array, "B n C"]:
        reads = frozenset({"tokens"})
        stats = completion_stats(apply_fn, params, rollouts.batch, chunk_tokens=chunk, reads=reads, mesh=mesh)
        assert stats.tokens is not None
        return stats.tokens

    critic, shardings = None, layout.shardings
    if isinstance(method, RLOO):
        update = make_rloo_update(method, optimizer, logps_of)
    else:
        shape = value_config(config)
        own, of_values = (
            peak if value_learning_rate is None else value_learning_rate,
            apply_on(shape, mesh, compute, remat=compute.remat),
        )
        critic = state_layout(mesh, shape, optimizer, learning_rate=own)
        shardings = actor_critic(shardings, critic.shardings)
        update = make_ppo_update(
            method, optimizer, logps_of, lambda params, rollouts: completion_values(of_values, params, rollouts.batch)
        )
    drawn = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "num_samples": num_samples}
    jitted = jax.jit(
        with_figures(update, schedule, method.updates),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    rollout = make_rollout(config, **drawn, mesh=mesh, compute=compute)  # type: ignore[arg-type]
    return RLProgram(mesh, config, method, layout, critic, rollout, jitted, max_new_tokens)


def value_config(config: DecoderConfig) -> DecoderConfig:
    """The shape of a policy's value model: the same layers, and one score in place of the unembedding."""
    return dataclasses.replace(config, head="score")


def initial_state(
    program: RLProgram, params: PyTree, seed: int = 0, *, value_params: PyTree | None = None
) -> TrainState:
    """The state before the first step, laid out over the program's mesh; ``state.policy`` is what a model reads.

    Args:
      program: the run's functions.
      params: of the policy, as host arrays or on the devices; they are copied.
      seed: of the state's random key, which neither method draws from.
      value_params: of PPO's value model, say of a reward model; default: the policy's layers, with a score of zero.
    """
    actor = program.layout.initial(params, seed)
    if program.critic is None:
        return actor
    start = {"score": jnp.zeros((1, program.config.width), jnp.float32), **(value_params or params)}
    value_params = {name: x for name, x in start.items() if name not in ("head", "head_bias")}
    return actor_critic(actor, program.critic.initial(value_params, seed))


def prompts_of(step: int, prompts: int, each: int, seed: int) -> np.ndarray:
    """The prompts of a step, by their index: one shuffled pass over them after another, known from the step alone."""
    passes, places = np.divmod(np.arange(step * each, (step + 1) * each), prompts)
    orders = {i: np.random.default_rng((seed, i)).permutation(prompts) for i in np.unique(passes).tolist()}
    return np.array([orders[i][place] for i, place in zip(passes.tolist(), places.tolist(), strict=True)])


def fit_rl(
    program: RLProgram,
    state: TrainState,
    prompts: Sequence[Sequence[int]],
    ref_params: PyTree,
    reward: Reward,
    *,
    steps: int,
    prompts_per_step: int,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> TrainState:
    """The state after some more steps. Nothing is written or printed.

    A state that has done some steps goes on where it was: prompts and samples are those of its next step.

    Args:
      program: the run's functions (:func:`make_rl_program`).
      state: donated to the first update (:func:`initial_state`).
      prompts: token ids, any lengths above 0.
      ref_params: of the reference.
      reward: judges samples (:data:`~dpojax.rl.rollout.Reward`).
      steps: how many; each draws samples and updates the policy.
      prompts_per_step: B, how many prompts are sampled from in a step; a multiple of the devices that split them.
      seed: of the prompts' order and of the samples.
      on_step: called after every step; returning False stops.

    Raises:
      ValueError: no prompts, or they do not fit the devices or the model's positions, or the reward gives something
        else than a number a sample.
    """
    shards, longest = batch_shards(program.mesh), max(map(len, prompts), default=0)
    if min(map(len, prompts), default=0) == 0:
        raise ValueError("prompts: none, or one without tokens; give token ids of each")
    if prompts_per_step % shards:
        raise ValueError(f"prompts_per_step {prompts_per_step}: {shards} devices split them; use a multiple")
    limit = program.config.longest
    if limit is not None and longest + program.max_new_tokens > limit:
        texts = f"a prompt of {longest} tokens and {program.max_new_tokens} new ones"
        raise ValueError(f"{texts} exceed the model's {limit} positions; cut the prompts")
    rows, lengths = pad_left(prompts, longest + longest % 2)  # even, as cuDNN's attention wants them
    reference, done = place_params(ref_params, program.mesh, program.config), int(state.step)
    for step in range(done, done + steps):
        at = prompts_of(step, len(prompts), prompts_per_step, seed)
        rollouts = program.rollout(state.policy, reference, rows[at], lengths[at], reward, seed=seed, step=step)
        state, metrics = program.update(state, rollouts)
        if on_step is not None and on_step(step + 1, state, metrics) is False:
            break
    return state
