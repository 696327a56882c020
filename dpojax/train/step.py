"""The train step: pure, jitted with shardings, state donated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from dpojax.compiler import compiler_options
from dpojax.packing import PairBatch, packing_of
from dpojax.sharding import batch_sharding, replicated
from dpojax.train.objectives import BatchContext, LossFn, Metrics, Running, mean_chosen_len
from dpojax.train.state import TrainState
from dpojax.types import Metric, PyTree, ReferenceOutput

StepFn = Callable[[TrainState, PairBatch, ReferenceOutput | None], tuple[TrainState, Metrics]]


def split_micro(tree: PyTree, n: int, sequences: int) -> PyTree:
    """``[B, ...]`` -> ``[n, B / n, ...]``: every n-th of the batch's packed sequences, so that rows stay on their
    device."""

    def split(x: Array) -> Array:
        x = x.reshape(sequences // n, n, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(n, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def join_micro(x: Array, sequences: int) -> Array:
    """The inverse of :func:`split_micro`, for one array."""
    n = x.shape[0]
    return jnp.moveaxis(x.reshape(n, sequences // n, -1, *x.shape[2:]), 0, 1).reshape(-1, *x.shape[2:])


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, micro_batches: int = 1
) -> StepFn:
    """``train_step(state, batch, ref) -> (state, metrics)``, pure.

    Gradients of the undivided loss are summed over micro-batches and divided once by the global batch's weight, so a
    batch gives the same update in one piece or in many. Metrics come back undivided. The optimizer's peak learning
    rate is 1; its updates are multiplied by ``state.hyper.learning_rate``.

    Args:
      loss_fn: a micro-batch's undivided loss and metrics.
      optimizer: built with ``schedule``.
      schedule: learning rate by step, relative to its peak, for the log.
      micro_batches: pieces that a batch is computed in.
    """

    def train_step(state: TrainState, batch: PairBatch, ref: ReferenceOutput | None) -> tuple[TrainState, Metrics]:
        context = BatchContext(state.hyper.beta, mean_chosen_len(batch), state.step, state.running)
        batch = dataclasses.replace(batch, key=row_keys(state, batch))
        head = None if ref is None else ref.head  # of no row, so in no micro-batch
        ref = ref and dataclasses.replace(ref, head=None)

        def undivided(
            params: PyTree, micro: tuple[PairBatch, ReferenceOutput | None]
        ) -> tuple[Array, tuple[Metrics, Running]]:
            policy, part = dataclasses.replace(state, params=params).policy, micro[1]
            part = part and dataclasses.replace(part, head=head)
            loss, metrics, running = loss_fn(policy, micro[0], part, context)
            return loss.sum, ({"loss": loss, **metrics}, running)

        grad_fn = jax.grad(undivided, has_aux=True)
        if micro_batches == 1:
            grads, (metrics, running) = grad_fn(state.params, (batch, ref))
        else:
            running = state.running  # objectives with running statistics see global batches

            def add(total: PyTree, micro: tuple[PairBatch, ReferenceOutput | None]) -> tuple[PyTree, None]:
                grads, (metrics, _) = grad_fn(state.params, micro)
                return jax.tree.map(jnp.add, total, (grads, metrics)), None

            micros = split_micro((batch, ref), micro_batches, packing_of(batch).padded_index.shape[0])
            grads, (metrics, _) = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], micros))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
            (grads, metrics), _ = jax.lax.scan(add, zeros, micros)

        share = 1 / jnp.maximum(metrics["loss"].weight, 1e-30)  # products fuse into their readers, quotients do not
        grads = jax.tree.map(lambda g: g * share, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        peak, one = state.hyper.learning_rate, jnp.float32(1)
        metrics["grad_norm"] = Metric(optax.tree.norm(grads), one)
        metrics["learning_rate"] = Metric(peak * jnp.asarray(schedule(state.step), jnp.float32), one)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: peak * u, updates))
        step = state.step + 1
        return dataclasses.replace(state, step=step, params=params, opt_state=opt_state, running=running), metrics

    return train_step


def row_keys(state: TrainState, batch: PairBatch) -> PRNGKeyArray:
    """A random key for every row of the batch, of this step's own; where no objective draws, none is computed."""
    return jax.random.split(jax.random.fold_in(state.rng, state.step), len(batch.prompt_len))


@dataclasses.dataclass(frozen=True)
class StepBesideFrozen:
    """A compiled step of a state with frozen parameters: it takes them as they are and gives back the same arrays, so
    that a reference can read them too."""

    jitted: Any

    def __call__(self, state: TrainState, batch: PairBatch, ref: ReferenceOutput | None) -> tuple[TrainState, Metrics]:
        moved, metrics = self.jitted(*self._apart(state), batch, ref)
        return dataclasses.replace(moved, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: PairBatch, ref: ReferenceOutput | None) -> Any:
        """The step lowered for inputs of these shapes."""
        return self.jitted.lower(*self._apart(state), batch, ref)

    def _apart(self, state: TrainState) -> tuple[TrainState, PyTree]:
        return dataclasses.replace(state, frozen={}), state.frozen


def jit_train_step(step: StepFn, mesh: Mesh, shardings: TrainState) -> StepFn:
    """The step compiled for a mesh: state and batch laid out over it, the old state's memory reused for the new.

    Frozen parameters are not donated: they are the same arrays before and after every step.
    """
    by_batch, frozen = batch_sharding(mesh), shardings.frozen
    moving = dataclasses.replace(shardings, frozen={})

    def beside(
        state: TrainState, frozen: PyTree, batch: PairBatch, ref: ReferenceOutput | None
    ) -> tuple[TrainState, Metrics]:
        state, metrics = step(dataclasses.replace(state, frozen=frozen), batch, ref)
        return dataclasses.replace(state, frozen={}), metrics

    # The reference's log-probabilities lie as the batch does, its unembedding as it lies among its parameters.
    inputs = (moving, frozen, by_batch, None) if frozen else (moving, by_batch, None)
    function = beside if frozen else step
    outputs, options = (moving, replicated(mesh)), compiler_options(mesh)
    jitted = jax.jit(function, in_shardings=inputs, out_shardings=outputs, donate_argnums=0, compiler_options=options)
    return StepBesideFrozen(jitted) if frozen else jitted
