"""A point of a sweep: one method with one set of numbers, trained from the reference, measured on the way."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpojax.configs import ComputeOptions
from dpojax.data import Batches, Example, draw_preferences, pairs_of
from dpojax.losses import spelled
from dpojax.models import Model, as_reward_model, load_model, save_model
from dpojax.rl import METHODS, fit_rl, make_rl_program, model_reward, text_reward
from dpojax.rl import initial_state as rl_state
from dpojax.sharding import batch_shards, held_sequences
from dpojax.train import (
    Program,
    fit,
    initial_state,
    live_reference,
    make_optimizer,
    make_program,
    make_schedule,
    moving_reference,
    no_reference,
    with_hyper,
)
from dpojax.train.reference import CachedReference
from experiments.claims import made_once
from experiments.measure import Measured
from experiments.world import World

Measure = Callable[[Any, int], Measured]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What is trained. Numbers that are None are the setting's."""

    name: str
    """Of the point, unique in its sweep; its files are called so."""
    method: str
    """Of the series that it belongs to."""
    loss: str = "sigmoid"
    """A preference objective, spelled as for --loss, or rloo or ppo."""
    beta: float = 0.1
    """Strength of the KL penalty; of Unlikelihood, alpha."""
    reward: Literal["true", "learned"] = "true"
    """That RL maximises."""
    seed: int = 0
    """Of labels, order and samples."""
    steps: int | None = None
    learning_rate: float | None = None
    label_noise: float = 0.0
    """Share of the labels that are turned round."""
    pairs: int | None = None
    """How many of the pairs there are."""
    reference: Literal["sft", "preferred_ft", "base", "moving"] = "sft"
    """Which policy is the reference, and where training starts; a moving one starts as SFT and follows the policy."""
    width: int | None = None
    """Of the model, where it is another than the setting's; its reference and samples are its own."""
    rounds: int = 1
    """Rounds of sampling from the policy, labelling, and training on from it."""
    new_reference: bool = True
    """Whether each round's reference is the policy that its pairs were sampled from, or SFT's."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """How a point ended: evaluations by step, some texts of the last, and the policy."""

    curve: list[dict[str, Any]]
    texts: list[tuple[str, str]]
    params: Any


class Evaluations:
    """Measures a policy after certain steps; ``first`` is how many steps there were before."""

    def __init__(self, world: World, point: Point, measure: Measure | None, steps: int, first: int = 0):
        self.measure, self.first, self.point = measure, first, point
        self.at = evaluation_steps(steps, world.setting.evaluations)
        self.curve: list[dict[str, Any]] = []
        self.texts: list[tuple[str, str]] = []

    def __call__(self, step: int, state: Any, *_: Any) -> None:
        if self.measure is None or step not in self.at:
            return
        seed = 1_000_003 * (self.point.seed + 1) + self.first + step  # of samples, others for every seed and step
        figures, self.texts = self.measure(state.policy, seed)
        self.curve.append({"step": self.first + step, **figures})

    def trained(self, params: Any) -> Trained:
        return Trained(self.curve, self.texts, params)


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """Steps after which a run is evaluated: the last, its half, and so on."""
    return sorted({max(1, round(steps / 2**k)) for k in range(evaluations)})


def train_point(world: World, point: Point, measure: Measure | None) -> Trained:
    """Train a point and measure it on the way (None: do not)."""
    if point.loss in ("rloo", "ppo"):
        return train_rl(world, point, measure)
    if point.rounds > 1:
        return train_rounds(world, point, measure)
    if point.loss == "reward_model":
        params = as_reward_model(world.reference, world.mesh).params
    else:
        params = start_of(world, point)
    examples, sums = pairs_for(world, point)
    known = sums if params is world.reference.params else None
    return train_pairs(world, point, measure, examples, known, params=params, ref=params)


# ---- preference objectives ----------------------------------------------------------------------------------------


def pairs_for(world: World, point: Point) -> tuple[list[Example], np.ndarray]:
    """A point's pairs in tokens, and the SFT model's log-probabilities of them, ``[n, 2]``."""
    drawn = world.drawn
    return labelled(world, point, drawn.prompts, drawn, drawn.logps)


def labelled(
    world: World, point: Point, prompts: Any, drawn: Any, logps: np.ndarray
) -> tuple[list[Example], np.ndarray]:
    setting = world.setting
    preferences = draw_preferences(
        drawn.rewards,
        labels=setting.labels,
        scale=setting.scale,
        label_noise=point.label_noise,
        group=min(setting.group, drawn.rewards.shape[1]),
        seed=point.seed,
    )
    if point.pairs is not None:
        rows = np.random.default_rng(point.seed).permutation(len(preferences))[: point.pairs]
        preferences = preferences[np.sort(rows)]
    return pairs_of(prompts, drawn.samples.lists(), preferences), preferences.sides(logps)


def start_of(world: World, point: Point) -> Any:
    """The parameters that a point starts from, which are its reference's too."""
    if point.reference == "preferred_ft":
        steps = world.setting.sft_like_steps
        preferred = dataclasses.replace(point, name="", loss="preferred_ft", reference="sft", steps=steps)
        return train_point(world, preferred, None).params
    if point.reference == "base":
        return load_base(world)
    return world.reference.params


def load_base(world: World) -> Any:
    from dpojax.train.by_name import load_policy

    steps = world.setting.sft_steps // 8  # a new model is not a language model without any
    return load_policy(world.fine_tuned(steps) if steps else world.base, mesh=world.mesh).params


@functools.lru_cache(maxsize=2)  # one objective's points follow another's; compiled steps are not kept for ever
def program_for(world: World, loss: str, steps: int, optim: str, warmup: int) -> Program:
    """The train step of an objective; beta and the learning rate are its inputs."""
    schedule = make_schedule(lr_scheduler_type="linear", warmup_steps=warmup, total_steps=steps)
    config = world.reference.config
    return make_program(
        as_reward_model(world.reference, world.mesh).config if loss == "reward_model" else config,
        spelled(loss).objective,
        mesh=world.mesh,
        schedule=schedule,
        optimizer=make_optimizer(schedule, optim=optim),  # type: ignore[arg-type]
        compute=ComputeOptions(dtype=world.setting.dtype),
    )


def steps_of(world: World, point: Point) -> int:
    """How many steps a point is trained for."""
    setting = world.setting
    if point.steps is not None:
        return point.steps
    if point.loss in ("rloo", "ppo"):
        return setting.ppo_steps if point.loss == "ppo" else setting.rl_steps
    if point.loss == "reward_model":
        return setting.reward_steps
    return setting.sft_like_steps if point.loss.startswith(("preferred_ft", "unlikelihood")) else setting.steps


def train_pairs(
    world: World,
    point: Point,
    measure: Measure | None,
    examples: list[Example],
    ref_sums: np.ndarray | None,
    *,
    params: Any,
    ref: Any,
    first_step: int = 0,
) -> Trained:
    """Train on pairs by a preference objective, Preferred-FT or Unlikelihood.

    Args:
      world, point, measure: what, and how it is measured (None: it is not).
      examples: the pairs.
      ref_sums: the reference's log-probabilities of them, ``[n, 2]``, if they are known.
      params: of the policy, before the first step.
      ref: of the reference.
      first_step: steps before these, for the curve.
    """
    setting, steps = world.setting, steps_of(world, point)
    warmup = min(setting.warmup_steps, steps // 5)
    program = program_for(world, point.loss, steps, setting.optim, warmup)
    usual = setting.reward_learning_rate if point.loss == "reward_model" else setting.learning_rate
    rate = usual if point.learning_rate is None else point.learning_rate
    state = with_hyper(initial_state(program, params, point.seed), beta=point.beta, learning_rate=rate)
    batches = Batches(
        examples,
        setting.batch_size,
        max_shapes=1,
        sequences=program.sequences,
        held=held_sequences(program.mesh, program.sequences),
        seed=point.seed,
        epochs=-(-steps * setting.batch_size // len(examples)),
    )
    reference = reference_for(world, point, program, ref_sums, ref)
    evaluations = Evaluations(world, point, measure, steps, first_step)
    state = fit(program, state, batches, reference, steps=steps, on_step=evaluations)
    return evaluations.trained(state.policy)


def reference_for(world: World, point: Point, program: Program, ref_sums: np.ndarray | None, ref: Any) -> Any:
    """The reference as the objective reads it; log-probabilities were kept of the policy that drew the pairs."""
    if not program.traits.reference:
        return no_reference()
    if point.reference == "moving":
        return moving_reference(program, ref, alpha=0.6, every=max(1, steps_of(world, point) // 8))
    if program.traits.needs_live_reference or ref_sums is None:
        return live_reference(program, ref)
    return CachedReference(ref_sums, program.traits, program.mesh)


def train_rounds(world: World, point: Point, measure: Measure | None) -> Trained:
    """Rounds of on-policy DPO: samples of the policy, labels, training from there on; steps and pairs of all rounds
    together are those of one offline run."""
    setting, drawn, curve = world.setting, world.drawn, []
    steps, texts = max(1, steps_of(world, point) // point.rounds), []
    each = max(setting.group, setting.samples // point.rounds // setting.group * setting.group)
    params = ref = world.reference.params
    for round in range(point.rounds):
        fresh = world.draw(params, drawn.prompts, each, seed=1000 * (point.seed + 1) + round)
        one = dataclasses.replace(point, seed=point.seed + 100 * round, steps=steps)
        ref = params if point.new_reference else ref
        examples, sums = labelled(world, one, fresh.prompts, fresh, fresh.logps)
        known, first = sums if ref is params else None, round * steps
        done = train_pairs(world, one, measure, examples, known, params=params, ref=ref, first_step=first)
        params, curve, texts = done.params, curve + done.curve, done.texts
    return Trained(curve, texts, params)


# ---- rewards and RL -----------------------------------------------------------------------------------------------


def reward_model_for(world: World, point: Point) -> Model:
    """A reward model, from the SFT model, by maximum likelihood on a point's pairs; it is trained once for all."""
    setting = world.setting
    pairs = "all" if point.pairs is None else str(point.pairs)
    name = f"reward_model-{pairs}-noise{point.label_noise:g}-seed{point.seed}-steps{setting.reward_steps}"

    def build(directory: Path) -> None:
        one = Point(
            name=name, method="reward model", loss="reward_model", seed=point.seed, label_noise=point.label_noise
        )
        done = train_point(world, dataclasses.replace(one, pairs=point.pairs), None)
        start = as_reward_model(world.reference, world.mesh)
        save_model(dataclasses.replace(start, params=done.params), directory / "model")

    return load_model(str(made_once(world.directory / "reward_models" / name, build) / "model"), mesh=world.mesh)


@functools.lru_cache(maxsize=2)
def rl_program_for(world: World, loss: str, steps: int) -> Any:
    """The rollout and update of RLOO or PPO; beta and the learning rate are inputs."""
    setting = world.setting
    method = METHODS[loss]()
    schedule = make_schedule(lr_scheduler_type="linear", warmup_steps=10, total_steps=steps * method.updates)
    return make_rl_program(
        world.reference.config,
        method,
        max_new_tokens=setting.new_tokens,
        eos_ids=world.reference.eos_ids(world.tokenizer),
        num_samples=setting.rl_samples,
        mesh=world.mesh,
        value_learning_rate=setting.value_learning_rate,
        schedule=schedule,
        optimizer=make_optimizer(schedule, optim="adamw", max_grad_norm=1.0),
        compute=ComputeOptions(dtype=setting.dtype),
    )


def train_rl(world: World, point: Point, measure: Measure | None) -> Trained:
    """Train by RLOO or PPO, on the true reward or on a learned one, both in the unit of the labels."""
    setting, steps, reference = world.setting, steps_of(world, point), world.reference
    program = rl_program_for(world, point.loss, steps)
    usual = setting.ppo_learning_rate if point.loss == "ppo" else setting.rl_learning_rate
    rate = usual if point.learning_rate is None else point.learning_rate
    state = with_hyper(rl_state(program, reference.params, point.seed), beta=point.beta, learning_rate=rate)
    if point.reward == "learned":
        model = reward_model_for(world, point)
        reward = model_reward(model.config, model.params, mesh=world.mesh)
    else:
        scaled = lambda prompts, texts: setting.scale * np.asarray(world.score_texts(prompts, texts))  # noqa: E731
        reward = text_reward(scaled, world.tokenizer)
    evaluations = Evaluations(world, point, measure, steps)
    shards = batch_shards(world.mesh)
    each = -(-max(1, setting.batch_size // setting.rl_samples) // shards) * shards
    prompts = world.prompts("train")
    state = fit_rl(
        program,
        state,
        prompts,
        reference.params,
        reward,
        steps=steps,
        prompts_per_step=each,
        seed=point.seed,
        on_step=evaluations,
    )
    return evaluations.trained(state.policy)
