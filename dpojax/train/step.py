"""The train state and the train step: pure, jitted with shardings, state donated."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from dpojax.logprobs import streams
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import split
from dpojax.sharding import batch_sharding, param_shardings, put_global, replicated
from dpojax.train.objectives import LossFn, Metrics
from dpojax.types import Metric, PairBatch, PairLogps, PyTree


@struct.dataclass
class TrainState:
    """All that a step changes. The reference is not part of it."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    rng: PRNGKeyArray
    """For objectives that draw; today's draw nothing, and the data order has a state of its own."""
    frozen: dict[str, PyTree] = struct.field(default_factory=dict)
    """Parameters that the model reads and no step changes: no gradient, no moments, in no checkpoint."""

    @property
    def policy(self) -> PyTree:
        """All that the model reads."""
        return {**self.params, **self.frozen} if self.frozen else self.params


StepFn = Callable[[TrainState, PairBatch, PairLogps | None], tuple[TrainState, Metrics]]


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, seed: int, frozen: Iterable[str] = ()
) -> TrainState:
    """The state before the first step; ``seed`` seeds its random key, ``frozen`` names what is not trained."""
    trained, kept = part(params, frozen)
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), jax.random.key(seed), kept)


def part(params: PyTree, frozen: Iterable[str]) -> tuple[PyTree, dict[str, PyTree]]:
    """What is trained, and what of these names is not."""
    kept = {name: params[name] for name in frozen}
    return {name: x for name, x in params.items() if name not in kept} if kept else params, kept


def initial_state(
    params: PyTree, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """The state before the first step, laid out over the mesh; ``params`` are host arrays and are not kept."""
    whole = lambda p: init_state(p, optimizer, seed, shardings.frozen)  # noqa: E731
    init = jax.jit(whole, out_shardings=shardings, donate_argnums=0)
    return init(put_global(params, shardings.policy))


def abstract_state(config: DecoderConfig, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and placement of the state, to restore into."""
    _, params = split(config)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, 0, shardings.frozen), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(
    mesh: Mesh, config: DecoderConfig, optimizer: optax.GradientTransformation, frozen: Iterable[str] = ()
) -> TrainState:
    """A sharding for every leaf of the state: optimizer moments lie where their parameters lie."""
    params, kept = part(param_shardings(mesh, config), frozen)
    shapes, _ = part(split(config)[1], frozen)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, opt_shapes, params, transform_non_params=lambda _: replicated(mesh)
    )
    return TrainState(replicated(mesh), params, moments, replicated(mesh), kept)  # type: ignore[arg-type]


def split_micro(tree: PyTree, n: int, streams: int) -> PyTree:
    """``[B, ...]`` -> ``[n, B / n, ...]``: every n-th of the batch's streams, so that rows stay on their device."""

    def split(x: Array) -> Array:
        x = x.reshape(streams // n, n, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(n, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def join_micro(x: Array, streams: int) -> Array:
    """The inverse of :func:`split_micro`, for one array."""
    n = x.shape[0]
    return jnp.moveaxis(x.reshape(n, streams // n, -1, *x.shape[2:]), 0, 1).reshape(-1, *x.shape[2:])


def jit_forward(
    forward: Callable[[PyTree, PairBatch], Array], mesh: Mesh, config: DecoderConfig, micro_batches: int = 1
) -> Callable[[PyTree, PairBatch], Array]:
    """``forward(params, batch)``, an array ``[B, ...]`` or ``[R, ...]``, compiled for a mesh.

    It goes through a batch in the train step's micro-batches, so that both see the same shapes.
    """

    def whole(params: PyTree, batch: PairBatch) -> Array:
        if micro_batches == 1:
            return forward(params, batch)
        R = streams(batch)[0].shape[0]
        return join_micro(jax.lax.map(lambda micro: forward(params, micro), split_micro(batch, micro_batches, R)), R)

    rows = batch_sharding(mesh)
    return jax.jit(whole, in_shardings=(param_shardings(mesh, config), rows), out_shardings=rows)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, micro_batches: int = 1
) -> StepFn:
    """``train_step(state, batch, ref) -> (state, metrics)``, pure.

    Gradients of the undivided loss are summed over micro-batches and divided once by the batch's whole weight, so a
    batch gives the same update in one piece or in many. Metrics come back undivided.
    """

    def train_step(state: TrainState, batch: PairBatch, ref: PairLogps | None) -> tuple[TrainState, Metrics]:
        mean_chosen_len = jnp.sum(batch.completion_len[:, 0] * batch.real) / jnp.maximum(jnp.sum(batch.real), 1.0)

        def undivided(params: PyTree, micro: tuple[PairBatch, PairLogps | None]) -> tuple[Array, Metrics]:
            loss, metrics = loss_fn(dataclasses.replace(state, params=params).policy, *micro, mean_chosen_len)
            return loss.sum, {"loss": loss, **metrics}

        grad_fn = jax.grad(undivided, has_aux=True)
        if micro_batches == 1:
            grads, metrics = grad_fn(state.params, (batch, ref))
        else:

            def add(total: PyTree, micro: tuple[PairBatch, PairLogps | None]) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, total, grad_fn(state.params, micro)), None

            micros = split_micro((batch, ref), micro_batches, streams(batch)[0].shape[0])
            shapes = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], micros))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(add, zeros, micros)

        share = 1 / jnp.maximum(metrics["loss"].weight, 1e-30)  # products fuse into their readers, quotients do not
        grads = jax.tree.map(lambda g: g * share, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        one = jnp.float32(1)
        metrics["grad_norm"] = Metric(optax.tree.norm(grads), one)
        metrics["learning_rate"] = Metric(jnp.asarray(schedule(state.step), jnp.float32), one)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def jit_train_step(step: StepFn, mesh: Mesh, shardings: TrainState) -> StepFn:
    """The step compiled for a mesh: state and batch laid out over it, the old state's memory reused for the new."""
    rows = batch_sharding(mesh)
    return jax.jit(
        step, in_shardings=(shardings, rows, rows), out_shardings=(shardings, replicated(mesh)), donate_argnums=0
    )
