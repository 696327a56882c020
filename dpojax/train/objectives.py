"""The loss that a step differentiates: a batch to an undivided loss and undivided metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpojax.logprobs import completion_rewards, completion_stats, labelled_logps, pair_up
from dpojax.losses import Objective, Traits, at_beta, log_ratios, per_token, traits_of, without_reference
from dpojax.models.lora import with_dropout
from dpojax.packing import ApplyFn, PairBatch, target_len
from dpojax.types import (
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
DROPOUT_DRAW = 1
"""Folded into a row's key, so that dropout and an objective do not draw the same."""


@struct.dataclass
class BatchContext:
    """What a micro-batch needs beside its own rows.

    Attributes:
      beta: strength of the KL penalty.
      mean_chosen_len: mean length of the chosen sides of the global batch, tokens.
      step: steps done before this one.
      running: the objective's running statistics after those steps.
      training: whether the running statistics are updated, and adapters' inputs dropped; held-out batches do neither.
    """

    beta: Float[Array, ""]
    mean_chosen_len: Float[Array, ""]
    step: Int[Array, ""]
    running: Running = struct.field(default_factory=dict)
    training: bool = struct.field(pytree_node=False, default=True)


LossFn = Callable[[PyTree, PairBatch, ReferenceOutput | None, BatchContext], tuple[Metric, Metrics, Running]]
"""(params, batch, reference, context) -> (loss, metrics, running statistics), loss and metrics undivided."""


def logps_of(stats: CompletionStats, batch: PairBatch, traits: Traits) -> Logps:
    """The log-probabilities that an objective of these traits reads: of labelled completions, of pairs, or, where rows
    have one completion, of pairs whose rejected side is empty."""
    if traits.on == "labels":
        return labelled_logps(stats, batch)
    if stats.sums.shape[1] == 1:
        return chosen_logps(stats, batch)
    pairs = pair_up(stats, batch)
    unread: dict[str, Any] = {
        name: None for name in ("margin", "weight", "key") if name not in traits.reads and traits.on != "scores"
    }
    return dataclasses.replace(pairs, **unread)


def chosen_logps(stats: CompletionStats, batch: PairBatch) -> PairLogps:
    """Log-probabilities of rows of one completion, which is the chosen side; the rejected side has length 0."""
    lengths = target_len(batch)[:, 0] * (batch.valid > 0)
    return PairLogps(stats.sums[:, 0], jnp.zeros_like(stats.sums[:, 0]), lengths, 0 * lengths)


def mean_chosen_len(batch: PairBatch) -> Float[Array, ""]:
    """Mean length of the chosen sides of a batch's pairs, or of its rows' one completion, tokens."""
    stats = CompletionStats(jnp.zeros(batch.completion_len.shape))
    lengths = (chosen_logps if batch.completion_len.shape[1] == 1 else pair_up)(stats, batch).chosen_len
    return jnp.sum(lengths) / jnp.maximum(jnp.sum(lengths > 0), 1).astype(jnp.float32)


Terms = dict[str, tuple[Float[Array, " B"], Float[Array, " B"]]]
"""By name: a value of every pair or completion, and 1 for those that the mean is over; values where it is 0 may be
anything."""


def pair_terms(policy: PairLogps, ref: PairLogps, objective: Objective, beta: Any) -> dict[str, Float[Array, " B"]]:
    """Loss and TRL's metrics of every pair, by name.

    ``rewards/accuracies`` counts a tie as half. Rewards tie where their difference is below float32's resolution, as
    all do before the first update, whatever the batches in which the reference was computed. A reward model's rewards
    are its scores; those of an objective of log-probabilities per token are per token.
    """
    traits, loss = traits_of(objective), at_beta(objective, policy, ref, beta)
    if traits.on == "scores":
        rewards = policy.chosen, policy.rejected
        return {"loss": loss, **reward_terms(*rewards, jnp.abs(rewards[0]) + jnp.abs(rewards[1]))}
    mine, theirs = (per_token(policy), per_token(ref)) if traits.per_token else (policy, ref)
    chosen, rejected = log_ratios(mine, theirs)
    magnitude = beta * (jnp.abs(mine.chosen) + jnp.abs(mine.rejected))
    logps = {"logps/chosen": policy.chosen, "logps/rejected": policy.rejected}
    return {"loss": loss, **reward_terms(beta * chosen, beta * rejected, magnitude), **logps}


def reward_terms(chosen: Any, rejected: Any, magnitude: Any) -> dict[str, Any]:
    """Rewards, margins and accuracies of pairs, ``[B]`` each, of JAX's or NumPy's numbers; a tie counts half."""
    margins = chosen - rejected
    preferred = (margins > 0) * 1.0 - (margins < 0)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (preferred * beyond_rounding(margins, magnitude) + 1) / 2,
        "rewards/margins": margins,
    }


def terms_of(policy: Logps, ref: Logps | None, objective: Objective, beta: Any, *, paired: bool = True) -> Terms:
    """Loss and TRL's metrics of a batch, by name.

    Args:
      policy: the policy's log-probabilities.
      ref: the reference's; None: rewards are of the policy alone.
      objective: gives the loss.
      beta: strength of the KL penalty, a number or a scalar array; it scales the rewards.
      paired: False where rows have one completion, of which there are no rewards.
    """
    if isinstance(policy, PairLogps):
        ref = without_reference(policy) if ref is None else ref
        assert isinstance(ref, PairLogps)
        mask = (policy.chosen_len > 0).astype(jnp.float32)
        if not paired:
            return {"loss": (at_beta(objective, policy, ref, beta), mask), "logps/chosen": (policy.chosen, mask)}
        return {name: (x, mask) for name, x in pair_terms(policy, ref, objective, beta).items()}
    assert isinstance(ref, LabelledLogps)
    mask = (policy.lengths > 0).astype(jnp.float32)
    values = {"rewards": beta * (policy.logps - ref.logps), "logps": policy.logps}
    sides = {"chosen": mask * policy.label, "rejected": mask * (1 - policy.label)}
    terms = {f"{name}/{side}": (x, where) for name, x in values.items() for side, where in sides.items()}
    return {"loss": (at_beta(objective, policy, ref, beta), mask), **terms}


def summed(terms: Terms) -> Metrics:
    """The terms' means, undivided.

    Neighbours are added, then neighbouring sums. The order of one long reduction would be the compiler's choice, and
    added one after another, 16 times ``log 2`` is not 16 times as much in float32.
    """
    sums = jnp.stack([jnp.where(mask > 0, x, 0.0) for x, mask in terms.values()])
    while (B := sums.shape[1]) > 1:
        halves = jnp.pad(sums, ((0, 0), (0, B % 2))).reshape(len(sums), -1, 2)
        sums = halves[..., 0] + halves[..., 1]  # not jnp.sum, which XLA would merge into one reduction again
    return {name: Metric(total, jnp.sum(terms[name][1])) for name, total in zip(terms, sums[:, 0], strict=True)}


def update_running(traits: Traits, policy: Logps, ref: Logps | None, context: BatchContext) -> Running:
    """The objective's running statistics after this step; before the first there are none."""
    policy, ref = jax.lax.stop_gradient((policy, ref))

    def update(function: Callable, name: str) -> dict[str, Array]:
        first, later = function(policy, ref, None), function(policy, ref, context.running[name])
        return jax.tree.map(lambda a, b: jnp.where(context.step == 0, a, b), first, later)

    return {name: update(function, name) for name, function in traits.running.items()}


def empty_running(objective: Objective) -> Running:
    """Zeros in the structure of the objective's running statistics."""
    traits, x, n = traits_of(objective), jnp.zeros((1,)), jnp.ones((1,), jnp.int32)
    policy: Any = LabelledLogps(x, n, x, x) if traits.on == "labels" else PairLogps(x, x, n, n)
    shapes = {name: jax.eval_shape(update, policy, policy, None) for name, update in traits.running.items()}
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def make_loss(
    apply_fn: ApplyFn,
    objective: Objective,
    *,
    chunk_tokens: int,
    mesh: Mesh | None = None,
    dropout: bool = False,
    balance: Callable[[], Array] | None = None,
    router_aux_loss_coef: float = 0.0,
) -> LossFn:
    """The loss of a batch under an objective, summed over its pairs or its labelled completions; its weight is their
    number.

    Args:
      apply_fn: the model.
      objective: gives the losses.
      chunk_tokens: completion tokens whose logits exist at one time on a device.
      mesh: the devices that a batch lies on (default: one).
      dropout: whether training gives the adapter a key of the batch's own.
      balance: the load-balancing loss of the model's last call, where it has a mixture of experts.
      router_aux_loss_coef: how often it is added to each pair's loss.
    """
    traits = traits_of(objective)

    def loss_fn(
        params: PyTree, batch: PairBatch, ref: ReferenceOutput | None, context: BatchContext
    ) -> tuple[Metric, Metrics, Running]:
        if dropout and context.training:
            assert batch.key is not None
            params = with_dropout(params, jax.random.fold_in(batch.key[0], DROPOUT_DRAW))
        if traits.on == "scores":
            stats = CompletionStats(completion_rewards(apply_fn, params, batch))
        else:
            reads = traits.statistics
            stats = completion_stats(
                apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=reads, ref=ref, mesh=mesh
            )
        policy, running = logps_of(stats, batch, traits), context.running
        theirs = None if ref is None else ref.logps
        if isinstance(policy, PairLogps):
            policy = dataclasses.replace(policy, mean_chosen_len=context.mean_chosen_len)
        if traits.running:
            running = update_running(traits, policy, theirs, context) if context.training else running
            policy = dataclasses.replace(policy, running=running)
        paired = batch.completion_len.shape[1] > 1
        metrics = summed(terms_of(policy, theirs, objective, context.beta, paired=paired))
        loss = metrics.pop("loss")
        if balance is not None:
            aux = balance()
            metrics["aux_loss"] = Metric(aux * loss.weight, loss.weight)
            loss = Metric(loss.sum + router_aux_loss_coef * aux * loss.weight, loss.weight)
        return loss, metrics, running

    return loss_fn
