"""What a step differentiates: a batch to an undivided loss and undivided metrics."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.logprobs import completion_logps, pair_logps
from dpojax.losses import Objective, implicit_rewards
from dpojax.types import ApplyFn, Metric, PairBatch, PairLogps, PyTree, told_apart

Metrics = dict[str, Metric]
LossFn = Callable[[PyTree, PairBatch, PairLogps | None, Float[Array, ""]], tuple[Metric, Metrics]]
"""(params, batch, reference, mean chosen length of the whole batch) -> (loss, metrics), all undivided."""


def preference_rows(
    policy: PairLogps, ref: PairLogps, objective: Objective, beta: float
) -> dict[str, Float[Array, " B"]]:
    """Loss and TRL's metrics of every pair, by name.

    ``rewards/accuracies`` counts a tie as half: rewards whose difference is below what float32 can tell, as all are
    before the first update, whatever the batches in which the reference was computed.
    """
    chosen, rejected = implicit_rewards(policy, ref, beta=beta)
    told = told_apart(chosen - rejected, beta * (jnp.abs(policy.chosen) + jnp.abs(policy.rejected)))
    preferred = jnp.where(told, jnp.sign(chosen - rejected), 0.0)
    return {
        "loss": objective(policy, ref),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (preferred + 1) / 2,
        "rewards/margins": chosen - rejected,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }


def preference_loss(apply_fn: ApplyFn, objective: Objective, *, beta: float, chunk_tokens: int) -> LossFn:
    """The loss of :mod:`dpojax.losses` objectives; the weight of a batch is its pairs."""

    def loss_fn(
        params: PyTree, batch: PairBatch, ref: PairLogps | None, mean_chosen_len: Float[Array, ""]
    ) -> tuple[Metric, Metrics]:
        assert ref is not None
        policy = pair_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)
        rows = preference_rows(dataclasses.replace(policy, mean_chosen_len=mean_chosen_len), ref, objective, beta)
        real = batch.real
        terms = {name: Metric(jnp.sum(jnp.where(real > 0, x, 0.0)), jnp.sum(real)) for name, x in rows.items()}
        return terms.pop("loss"), terms

    return loss_fn


def imitation_loss(apply_fn: ApplyFn, *, chunk_tokens: int) -> LossFn:
    """Cross-entropy of the completions' tokens; the weight of a batch is its completion tokens."""

    def loss_fn(
        params: PyTree, batch: PairBatch, ref: PairLogps | None, mean_chosen_len: Float[Array, ""]
    ) -> tuple[Metric, Metrics]:
        logps = completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)[:, 0]
        tokens = batch.completion_len[:, 0].astype(jnp.float32)
        rows = Metric(jnp.sum(logps * batch.real), jnp.sum(batch.real))
        return Metric(-rows.sum, jnp.sum(tokens * batch.real)), {"logps/chosen": rows}

    return loss_fn
