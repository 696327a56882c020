"""The train state and the train step: pure, jitted with shardings, state donated."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import split
from dpojax.packing import PairBatch, packing_of
from dpojax.sharding import batch_sharding, param_shardings, put_global, replicated
from dpojax.train.objectives import LossFn, Metrics, Running, Whole, mean_chosen_len
from dpojax.types import Metric, PyTree, ReferenceOutput


@struct.dataclass
class TrainState:
    """All that a step changes. The reference is not part of it."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    rng: PRNGKeyArray
    """For objectives that draw; the data order has a state of its own."""
    frozen: dict[str, PyTree] = struct.field(default_factory=dict)
    """Parameters that the model reads and no step changes: no gradient, no moments, in no checkpoint."""
    running: Running = struct.field(default_factory=dict)
    """What the objective keeps over the steps, by its name."""

    @property
    def policy(self) -> PyTree:
        """All that the model reads."""
        return {**self.params, **self.frozen} if self.frozen else self.params


StepFn = Callable[[TrainState, PairBatch, ReferenceOutput | None], tuple[TrainState, Metrics]]


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    seed: int,
    frozen: Iterable[str] = (),
    running: Running | None = None,
) -> TrainState:
    """The state before the first step; ``seed`` seeds its random key, ``frozen`` names what is not trained."""
    trained, kept = part(params, frozen)
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), jax.random.key(seed), kept, running or {})


def part(params: PyTree, frozen: Iterable[str]) -> tuple[PyTree, dict[str, PyTree]]:
    """What is trained, and what of these names is not."""
    kept = {name: params[name] for name in frozen}
    return {name: x for name, x in params.items() if name not in kept} if kept else params, kept


def initial_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
    running: Running | None = None,
) -> TrainState:
    """The state before the first step, laid out over the mesh; ``params`` are host arrays and are not kept."""
    whole = lambda p: init_state(p, optimizer, seed, shardings.frozen, running)  # noqa: E731
    init = jax.jit(whole, out_shardings=shardings, donate_argnums=0)
    return init(put_global(params, shardings.policy))


def abstract_state(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    running: Running | None = None,
) -> TrainState:
    """Shapes, dtypes and placement of the state, to restore into."""
    _, params = split(config)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, 0, shardings.frozen, running), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(
    mesh: Mesh,
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    frozen: Iterable[str] = (),
    running: Running | None = None,
) -> TrainState:
    """A sharding for every leaf of the state: optimizer moments lie where their parameters lie."""
    params, kept = part(param_shardings(mesh, config), frozen)
    shapes, _ = part(split(config)[1], frozen)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, opt_shapes, params, transform_non_params=lambda _: replicated(mesh)
    )
    whole = replicated(mesh)
    kept_by_losses = jax.tree.map(lambda _: whole, running or {})
    return TrainState(whole, params, moments, whole, kept, kept_by_losses)  # type: ignore[arg-type]


def split_micro(tree: PyTree, n: int, sequences: int) -> PyTree:
    """``[B, ...]`` -> ``[n, B / n, ...]``: every n-th of the batch's packed sequences, so that rows stay on their device."""

    def split(x: Array) -> Array:
        x = x.reshape(sequences // n, n, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(n, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def join_micro(x: Array, sequences: int) -> Array:
    """The inverse of :func:`split_micro`, for one array."""
    n = x.shape[0]
    return jnp.moveaxis(x.reshape(n, sequences // n, -1, *x.shape[2:]), 0, 1).reshape(-1, *x.shape[2:])


def jit_forward(
    forward: Callable[[PyTree, PairBatch], Any], mesh: Mesh, config: DecoderConfig, micro_batches: int = 1
) -> Callable[[PyTree, PairBatch], Any]:
    """``forward(params, batch)``, arrays ``[B, ...]`` or ``[R, ...]``, compiled for a mesh.

    It goes through a batch in the train step's micro-batches, so that both see the same shapes.
    """

    def whole(params: PyTree, batch: PairBatch) -> Any:
        if micro_batches == 1:
            return forward(params, batch)
        R = packing_of(batch).padded_index.shape[0]
        parts = jax.lax.map(lambda micro: forward(params, micro), split_micro(batch, micro_batches, R))
        return jax.tree.map(lambda x: join_micro(x, R), parts)

    rows = batch_sharding(mesh)
    return jax.jit(whole, in_shardings=(param_shardings(mesh, config), rows), out_shardings=rows)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, micro_batches: int = 1
) -> StepFn:
    """``train_step(state, batch, ref) -> (state, metrics)``, pure.

    Gradients of the undivided loss are summed over micro-batches and divided once by the batch's whole weight, so a
    batch gives the same update in one piece or in many. Metrics come back undivided.
    """

    def train_step(state: TrainState, batch: PairBatch, ref: ReferenceOutput | None) -> tuple[TrainState, Metrics]:
        whole = Whole(mean_chosen_len(batch), state.step, state.running)
        batch = dataclasses.replace(batch, key=row_keys(state, batch))
        head = None if ref is None else ref.head  # of no row, so in no micro-batch
        ref = ref and dataclasses.replace(ref, head=None)

        def undivided(
            params: PyTree, micro: tuple[PairBatch, ReferenceOutput | None]
        ) -> tuple[Array, tuple[Metrics, Running]]:
            policy, part = dataclasses.replace(state, params=params).policy, micro[1]
            part = part and dataclasses.replace(part, head=head)
            loss, metrics, running = loss_fn(policy, micro[0], part, whole)
            return loss.sum, ({"loss": loss, **metrics}, running)

        grad_fn = jax.grad(undivided, has_aux=True)
        if micro_batches == 1:
            grads, (metrics, running) = grad_fn(state.params, (batch, ref))
        else:
            running = state.running  # an objective that keeps any sees whole batches

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
        one = jnp.float32(1)
        metrics["grad_norm"] = Metric(optax.tree.norm(grads), one)
        metrics["learning_rate"] = Metric(jnp.asarray(schedule(state.step), jnp.float32), one)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        return dataclasses.replace(state, step=step, params=params, opt_state=opt_state, running=running), metrics

    return train_step


def row_keys(state: TrainState, batch: PairBatch) -> PRNGKeyArray:
    """A random key for every row of the batch, of this step's own; where no objective draws, none is computed."""
    return jax.random.split(jax.random.fold_in(state.rng, state.step), len(batch.prompt_len))


def jit_train_step(step: StepFn, mesh: Mesh, shardings: TrainState) -> StepFn:
    """The step compiled for a mesh: state and batch laid out over it, the old state's memory reused for the new."""
    rows = batch_sharding(mesh)
    # The reference's log-probabilities lie as the batch does, its unembedding as it lies among its parameters.
    return jax.jit(
        step, in_shardings=(shardings, rows, None), out_shardings=(shardings, replicated(mesh)), donate_argnums=0
    )
