"""Held-out figures of a run: from sums of log-probabilities, or batch by batch where an objective reads more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data import Batches, lengths_only
from dpojax.progress import track
from dpojax.sharding import put_batch
from dpojax.train.objectives import Metrics, Running, Terms, logps_of, terms_of
from dpojax.train.program import Program
from dpojax.train.reference import CachedReference, NoReference, Reference
from dpojax.train.scoring import collect_logps
from dpojax.types import CompletionStats, Logps, PyTree


def evaluate(
    program: Program,
    params: PyTree,
    batches: Batches,
    reference: Reference,
    *,
    running: Running | None = None,
    beta: float | None = None,
    sums: np.ndarray | None = None,
) -> dict[str, float]:
    """Loss and metrics of a policy on held-out data, ``eval_...`` by name.

    Args:
      program: the run's functions.
      params: all parameters of the policy, on the devices.
      batches: the held-out data.
      reference: of these batches.
      running: the objective's running statistics (default: those before the first step).
      beta: strength of the KL penalty (default: the program's own).
      sums: the policy's log-probabilities of the examples, ``[n, N]``, where they are known.
    """
    layout = program.layout
    running = layout.running if running is None else running
    beta_now = np.float32(layout.hyper.beta if beta is None else beta)
    known = isinstance(reference, CachedReference | NoReference)
    if program.traits.needs_forward_pass or not known:
        metrics = metrics_by_batch(program, params, batches, reference, running, beta_now)
        return {f"eval_{name}": metric.mean for name, metric in metrics.items()}
    if sums is None:
        sums = collect_logps(program.policy_logps, params, batches, program.mesh, "Evaluating")
    ref_sums = reference.sums if isinstance(reference, CachedReference) else None
    terms = terms_of_sums(program, batches, sums, ref_sums, running, beta_now)
    # Not in float32, whose sum of many equal numbers is not their multiple.
    return {f"eval_{name}": float(np.mean(x[mask > 0], dtype=np.float64)) for name, (x, mask) in terms.items()}


def terms_of_sums(
    program: Program, batches: Batches, sums: np.ndarray, ref_sums: np.ndarray | None, running: Running, beta: PyTree
) -> Terms:
    """Loss and metrics of every held-out pair or completion, with all of them as one batch."""
    whole = jax.tree.map(jnp.asarray, lengths_only(batches.examples))

    def logps(sums: np.ndarray) -> Logps:
        return logps_of(CompletionStats(jnp.asarray(sums)), whole, program.traits)

    policy = dataclasses.replace(logps(sums), running=jax.device_get(running))
    ref = None if ref_sums is None else logps(ref_sums)
    return jax.device_get(terms_of(policy, ref, program.objective, beta, paired=sums.shape[1] > 1))


def metrics_by_batch(
    program: Program, params: PyTree, batches: Batches, reference: Reference, running: Running, beta: PyTree
) -> Metrics:
    """Undivided loss and metrics, summed over the held-out batches."""
    total: Metrics = {}
    for i, item in enumerate(track(list(batches), "Evaluating")):
        batch = put_batch(item.batch, program.mesh)
        metrics = program.eval_step(params, batch, reference.of(item), i, running, beta)
        total = jax.tree.map(jnp.add, total, metrics) if total else metrics
    return total
