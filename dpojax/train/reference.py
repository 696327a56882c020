"""The frozen reference as the train step meets it: log-probabilities of a batch, by :meth:`Reference.of`.

A reference is immutable. One that moves is replaced by the one that :meth:`Reference.after` returns.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpojax.data import Batches, IndexedBatch
from dpojax.losses import Traits
from dpojax.models import combine, partition
from dpojax.packing import PairBatch
from dpojax.sharding import put_batch
from dpojax.train.logps_cache import LogpsCache
from dpojax.train.objectives import logps_of
from dpojax.train.program import Program
from dpojax.train.scoring import collect_logps, place_params
from dpojax.types import CompletionStats, PyTree, ReferenceOutput


class Reference:
    """What all references have in common."""

    def of(self, item: IndexedBatch) -> ReferenceOutput | None:
        """The reference's log-probabilities of a batch; None where the objective reads none."""
        raise NotImplementedError

    def after(self, step: int, policy: PyTree) -> "Reference":
        """The reference after this many steps, which have led to this policy; the earlier one is used no more."""
        return self


class NoReference(Reference):
    """That of an objective which reads none."""

    def of(self, item: IndexedBatch) -> ReferenceOutput | None:
        return None


@dataclasses.dataclass(frozen=True)
class CachedReference(Reference):
    """Sums of log-probabilities, ``[n, N]``, nats, of the examples that batches index; no parameters."""

    sums: np.ndarray
    traits: Traits
    mesh: Mesh

    def of(self, item: IndexedBatch) -> ReferenceOutput | None:
        sums = np.where(item.held[:, None] >= 0, self.sums[item.held], 0.0)
        logps = logps_of(CompletionStats(sums), item.batch, self.traits)  # type: ignore[arg-type]  # NumPy's
        return put_batch(ReferenceOutput(logps), self.mesh)


@dataclasses.dataclass(frozen=True)
class LiveReference(Reference):
    """Parameters on the devices; every batch costs one more forward pass."""

    params: PyTree
    step: Callable[[PyTree, PairBatch], ReferenceOutput]
    mesh: Mesh

    def of(self, item: IndexedBatch) -> ReferenceOutput | None:
        # Hidden states are of the policy's frozen layers; the reference may have others.
        whole = dataclasses.replace(item.batch, hidden=None)
        return self.step(self.params, put_batch(whole, self.mesh))


@dataclasses.dataclass(frozen=True)
class MovingReference(LiveReference):
    """``ref <- alpha policy + (1 - alpha) ref`` every so many steps (Gorbatovski et al. 2024, TR-DPO, arXiv
    2404.09656, equation 5)."""

    alpha: float
    every: int

    def after(self, step: int, policy: PyTree) -> Reference:
        if step % self.every:
            return self
        return dataclasses.replace(self, params=mix(self.params, policy, self.alpha))


@functools.partial(jax.jit, donate_argnums=0)
def mix(ref: PyTree, policy: PyTree, alpha: float) -> PyTree:
    """``alpha policy + (1 - alpha) ref``, exactly the policy at alpha 1."""
    return jax.tree.map(lambda r, p: jnp.where(alpha == 1, p, alpha * p + (1 - alpha) * r), ref, policy)


def no_reference() -> NoReference:
    """The reference of an objective that reads none."""
    return NoReference()


def cached_reference(
    program: Program,
    params: PyTree | Callable[[], PyTree],
    batches: Batches,
    *,
    label: str = "Reference log-probabilities",
    limit: int | None = None,
    cache: LogpsCache | None = None,
) -> CachedReference:
    """The reference of these batches, its log-probabilities computed once.

    Args:
      program: the run's functions.
      params: the reference's parameters; or a function that gives them, which is called if anything is to be computed.
      batches: those that :meth:`Reference.of` will be asked for, in their own packing, whose rounding is the steps'.
      label: names the stage on the console.
      limit: of batches; default: all.
      cache: log-probabilities that are known; new ones are added.
    """
    placed = lambda: place_params(params() if callable(params) else params, program.mesh, program.config)  # noqa: E731
    sums = collect_logps(program.logps_step, placed, batches, program.mesh, label, limit, cache)
    return CachedReference(sums, program.traits, program.mesh)


def live_reference(program: Program, params: PyTree) -> LiveReference:
    """The reference of any batch; it has a copy of what a step trains, whose memory the step takes over, and reads the
    policy's own arrays of what is frozen."""
    trained, frozen = partition(place_params(params, program.mesh, program.config), program.layout.trainable)
    return LiveReference(combine(_copy(trained), frozen), program.ref_step, program.mesh)


def moving_reference(program: Program, params: PyTree, *, alpha: float = 0.6, every: int = 512) -> MovingReference:
    """A live reference that every so many steps becomes ``alpha`` parts policy, ``1 - alpha`` parts itself."""
    return MovingReference(copied(program, params), program.ref_step, program.mesh, alpha, every)


def copied(program: Program, params: PyTree) -> PyTree:
    """A copy of the parameters on the mesh."""
    return _copy(place_params(params, program.mesh, program.config))


def _copy(params: PyTree) -> PyTree:
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p))(params) if params else params
