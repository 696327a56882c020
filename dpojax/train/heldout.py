"""Held-out figures of a run: from sums of log-probabilities, or batch by batch where an objective reads more."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data import Batches, lengths_only
from dpojax.packing import PairBatch
from dpojax.progress import track
from dpojax.sharding import batch_sharding, put_global
from dpojax.train.objectives import Metrics, Running, Whole, logps_of, mean_chosen_len, preference_terms
from dpojax.train.reference import Reference, collect_logps
from dpojax.train.setup import Program
from dpojax.train.step import TrainState
from dpojax.types import CompletionStats, Logps, PyTree


class HeldOut:
    """A run's held-out data, to measure a policy on.

    Args:
      program: the run's functions.
      batches: the held-out data.
      reference: holds its log-probabilities of them, or computes them.
    """

    def __init__(self, program: Program, batches: Batches, reference: Reference):
        self.program, self.batches, self.reference = program, batches, reference
        self.step = jax.jit(self._of_batch)

    def figures(self, state: TrainState, sums: np.ndarray | None = None) -> dict[str, float]:
        """``eval_...`` figures of the state's policy; ``sums`` are its log-probabilities, ``[n, N]``, if known."""
        program, batches = self.program, self.batches
        if program.objective is not None and (program.traits.needs_forward_pass or self.reference.moves):
            return {f"eval_{name}": metric.mean for name, metric in self._by_batch(state).items()}
        if sums is None:
            sums = collect_logps(program.policy_logps, state.policy, batches, program.mesh, "Evaluating")
        if program.objective is None:  # imitation
            tokens = batches.completions.sum()
            return {"eval_loss": float(-sums.sum() / tokens), "eval_logps/chosen": float(sums.mean())}
        terms = self._of_sums(sums, state.running)
        # Not in float32, whose sum of many equal numbers is not their multiple.
        return {f"eval_{name}": float(np.mean(x[real > 0], dtype=np.float64)) for name, (x, real) in terms.items()}

    def _of_sums(self, sums: np.ndarray, running: Running) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """All held-out rows as one batch: loss and metrics of every row, and which of them count."""
        program = self.program
        assert program.objective is not None
        rows = jax.tree.map(jnp.asarray, lengths_only(self.batches.examples))

        def logps(sums: np.ndarray) -> Logps:
            return logps_of(CompletionStats(jnp.asarray(sums)), rows, program.traits)

        policy = dataclasses.replace(logps(sums), running=running)
        ref = None if self.reference.eval_sums is None else logps(self.reference.eval_sums)
        return jax.device_get(preference_terms(policy, ref, program.objective, program.beta))

    def _by_batch(self, state: TrainState) -> Metrics:
        total: Metrics = {}
        rows, running = batch_sharding(self.program.mesh), state.running
        for i, item in enumerate(track(list(self.batches), "Evaluating")):
            ref = self.reference.of(item, held_out=True)
            metrics = self.step(state.policy, put_global(item.batch, rows), ref, i, running)
            total = jax.tree.map(jnp.add, total, metrics) if total else metrics
        return total

    def _of_batch(self, params: PyTree, batch: PairBatch, ref: Any, i: int, running: Running) -> Metrics:
        """Its draws are the same at every evaluation."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), len(batch.prompt_len))
        whole = Whole(mean_chosen_len(batch), jnp.int32(0), running, training=False)
        loss, metrics, _ = self.program.loss_fn(params, dataclasses.replace(batch, key=keys), ref, whole)
        return {"loss": loss, **metrics}
