"""What a step differentiates: a batch to an undivided loss and undivided metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dpojax.logprobs import completion_logps, completion_rewards, completion_stats, labelled_logps, pair_up
from dpojax.losses import Objective, Traits, implicit_rewards, per_token, traits_of, without_reference
from dpojax.packing import PairBatch
from dpojax.types import (
    ApplyFn,
    CompletionStats,
    LabelledLogps,
    Logps,
    Metric,
    PairLogps,
    PyTree,
    ReferenceOutput,
    beyond_rounding,
)

Metrics = dict[str, Metric]
Running = dict[str, dict[str, Array]]


@struct.dataclass
class Whole:
    """What a part of a batch must know of the whole, and of the steps before."""

    mean_chosen_len: Float[Array, ""]
    step: Int[Array, ""]
    running: Running = struct.field(default_factory=dict)
    training: bool = struct.field(pytree_node=False, default=True)


LossFn = Callable[[PyTree, PairBatch, ReferenceOutput | None, Whole], tuple[Metric, Metrics, Running]]
"""(params, batch, reference, whole) -> (loss, metrics, running statistics), loss and metrics undivided."""


def logps_of(stats: CompletionStats, batch: PairBatch, traits: Traits) -> Logps:
    """What an objective reads, made of completions' log-probabilities."""
    if traits.on == "labels":
        return labelled_logps(stats, batch)
    pairs = pair_up(stats, batch)
    unread: dict[str, Any] = {
        name: None for name in ("margin", "weight", "key") if name not in traits.reads and traits.on != "scores"
    }
    return dataclasses.replace(pairs, **unread)


def mean_chosen_len(batch: PairBatch) -> Float[Array, ""]:
    """Mean length of the chosen sides of a batch's pairs, tokens."""
    if batch.completion_len.shape[1] == 1:
        return jnp.float32(0)  # there are no pairs
    lengths = pair_up(CompletionStats(jnp.zeros(batch.completion_len.shape)), batch).chosen_len
    return jnp.sum(lengths) / jnp.maximum(jnp.sum(lengths > 0), 1).astype(jnp.float32)


def preference_rows(
    policy: PairLogps, ref: PairLogps, objective: Objective, beta: float
) -> dict[str, Float[Array, " B"]]:
    """Loss and TRL's metrics of every pair, by name.

    ``rewards/accuracies`` counts a tie as half: rewards whose difference is below what float32 can tell, as all are
    before the first update, whatever the batches in which the reference was computed. Of a reward model, the rewards
    are its scores; of an objective of log-probabilities per token, they are per token.
    """
    if traits_of(objective).on == "scores":
        rewards = policy.chosen, policy.rejected
        return {"loss": objective(policy, ref), **_ordering(*rewards, jnp.abs(rewards[0]) + jnp.abs(rewards[1]))}
    mine, theirs = (per_token(policy), per_token(ref)) if traits_of(objective).per_token else (policy, ref)
    rewards = implicit_rewards(mine, theirs, beta=beta)
    magnitude = beta * (jnp.abs(mine.chosen) + jnp.abs(mine.rejected))
    logps = {"logps/chosen": policy.chosen, "logps/rejected": policy.rejected}
    return {"loss": objective(policy, ref), **_ordering(*rewards, magnitude), **logps}


def _ordering(chosen: Array, rejected: Array, magnitude: Array) -> dict[str, Float[Array, " B"]]:
    margins = chosen - rejected
    preferred = jnp.where(beyond_rounding(margins, magnitude), jnp.sign(margins), 0.0)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (preferred + 1) / 2,
        "rewards/margins": margins,
    }


Terms = dict[str, tuple[Float[Array, " B"], Float[Array, " B"]]]
"""By name: a value of every row, and 1 for the rows that it is a mean over; what others hold may be anything."""


def preference_terms(policy: Logps, ref: Logps | None, objective: Objective, beta: float) -> Terms:
    """Loss and TRL's metrics of a batch, by name; without a reference, rewards are of the policy alone."""
    if isinstance(policy, PairLogps):
        ref = without_reference(policy) if ref is None else ref
        assert isinstance(ref, PairLogps)
        real = (policy.chosen_len > 0).astype(jnp.float32)
        return {name: (x, real) for name, x in preference_rows(policy, ref, objective, beta).items()}
    assert isinstance(ref, LabelledLogps)
    real = (policy.lengths > 0).astype(jnp.float32)
    rows = {"rewards": beta * (policy.logps - ref.logps), "logps": policy.logps}
    sides = {"chosen": real * policy.label, "rejected": real * (1 - policy.label)}
    terms = {f"{name}/{side}": (x, mask) for name, x in rows.items() for side, mask in sides.items()}
    return {"loss": (objective(policy, ref), real), **terms}


def summed(terms: Terms) -> Metrics:
    """The terms' means, undivided."""
    return {name: Metric(jnp.sum(jnp.where(real > 0, x, 0.0)), jnp.sum(real)) for name, (x, real) in terms.items()}


def update_running(traits: Traits, policy: Logps, ref: Logps | None, whole: Whole) -> Running:
    """What the objective keeps over the steps, after this one; there is no old value before the first."""
    policy, ref = jax.lax.stop_gradient((policy, ref))

    def update(function: Callable, name: str) -> dict[str, Array]:
        first, later = function(policy, ref, None), function(policy, ref, whole.running[name])
        return jax.tree.map(lambda a, b: jnp.where(whole.step == 0, a, b), first, later)

    return {name: update(function, name) for name, function in traits.running.items()}


def empty_running(objective: Objective) -> Running:
    """Zeros in the structure of what the objective keeps."""
    traits, x, n = traits_of(objective), jnp.zeros((1,)), jnp.ones((1,), jnp.int32)
    policy: Any = LabelledLogps(x, n, x, x) if traits.on == "labels" else PairLogps(x, x, n, n)
    shapes = {name: jax.eval_shape(update, policy, policy, None) for name, update in traits.running.items()}
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def preference_loss(apply_fn: ApplyFn, objective: Objective, *, beta: float, chunk_tokens: int) -> LossFn:
    """The loss of :mod:`dpojax.losses` objectives; the weight of a batch is its pairs, or its labelled completions."""
    traits = traits_of(objective)

    def loss_fn(
        params: PyTree, batch: PairBatch, ref: ReferenceOutput | None, whole: Whole
    ) -> tuple[Metric, Metrics, Running]:
        if traits.on == "scores":
            stats = CompletionStats(completion_rewards(apply_fn, params, batch))
        else:
            reads = traits.reads
            stats = completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=reads, ref=ref)
        policy, running = logps_of(stats, batch, traits), whole.running
        theirs = None if ref is None else ref.logps
        if isinstance(policy, PairLogps):
            policy = dataclasses.replace(policy, mean_chosen_len=whole.mean_chosen_len)
        if traits.running:
            running = update_running(traits, policy, theirs, whole) if whole.training else running
            policy = dataclasses.replace(policy, running=running)
        metrics = summed(preference_terms(policy, theirs, objective, beta))
        return metrics.pop("loss"), metrics, running

    return loss_fn


def imitation_loss(apply_fn: ApplyFn, *, chunk_tokens: int) -> LossFn:
    """Cross-entropy of the completions' tokens; the weight of a batch is its completion tokens."""

    def loss_fn(
        params: PyTree, batch: PairBatch, ref: ReferenceOutput | None, whole: Whole
    ) -> tuple[Metric, Metrics, Running]:
        logps = completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)[:, 0]
        tokens = batch.completion_len[:, 0].astype(jnp.float32)
        rows = Metric(jnp.sum(logps * batch.valid), jnp.sum(batch.valid))
        return Metric(-rows.sum, jnp.sum(tokens * batch.valid)), {"logps/chosen": rows}, {}

    return loss_fn
