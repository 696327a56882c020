"""The train state: all that a step changes, and where each of its arrays lies on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpojax.models import DecoderConfig, abstract_params, combine, param_shardings, partition
from dpojax.sharding import put_global, replicated
from dpojax.train.objectives import Running
from dpojax.types import PyTree


@struct.dataclass
class Hyper:
    """Numbers that the compiled step takes as inputs, so that a sweep over them compiles once.

    They are in no checkpoint: a run that continues has them from its options.
    """

    beta: Float[Array, ""]
    """Strength of the KL penalty."""
    learning_rate: Float[Array, ""]
    """Peak learning rate; the optimizer's updates are multiplied by it."""


@struct.dataclass
class TrainState:
    """Parameters, optimizer state and random key of a run. The reference is not part of it.

    Attributes:
      step: steps done.
      params: the trained parameters.
      opt_state: the optimizer's state.
      rng: random key of the objectives that draw; the data order has a state of its own.
      hyper: numbers that the step takes as inputs.
      frozen: parameters that the model reads and no step changes: no gradient, no moments, in no checkpoint.
      running: the objective's running statistics, by its name.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    rng: PRNGKeyArray
    hyper: Hyper
    frozen: PyTree = struct.field(default_factory=dict)
    running: Running = struct.field(default_factory=dict)

    @property
    def policy(self) -> PyTree:
        """All parameters that the model reads."""
        return combine(self.params, self.frozen) if self.frozen else self.params


Trainable = Callable[[str], bool]
"""Whether a step changes the parameter of this path, ``blocks/q``."""


def every(path: str) -> bool:
    """True: all parameters are trained."""
    return True


def with_hyper(state: TrainState, **numbers: float) -> TrainState:
    """The state with another ``beta`` or ``learning_rate``, for which no step compiles anew."""
    old = state.hyper
    new = {name: jax.device_put(np.float32(x), getattr(old, name).sharding) for name, x in numbers.items()}
    return dataclasses.replace(state, hyper=dataclasses.replace(old, **new))


def placed(params: PyTree, shardings: PyTree) -> PyTree:
    """Parameters on the devices, laid out by their shardings; arrays that lie so already are not copied."""

    def place(x: Any, sharding: NamedSharding) -> Array:
        there = isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim)
        return x if there else put_global(x, sharding)

    return jax.tree.map(place, params, shardings)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """All that shapes a train state, and a sharding for each of its leaves.

    Attributes:
      config: shape of the model that the step runs.
      optimizer: with a peak learning rate of 1.
      hyper: the state's numbers.
      running: zeros in the structure of the objective's running statistics.
      trainable: whether a step changes the parameter of a path.
      shardings: a sharding for every leaf; optimizer moments lie where their parameters lie.
    """

    config: DecoderConfig
    optimizer: optax.GradientTransformation
    hyper: Hyper
    running: Running
    trainable: Trainable
    shardings: TrainState

    def make(self, params: PyTree, hyper: Hyper, seed: int) -> TrainState:
        """The state before the first step, as a pure function of the parameters."""
        trained, frozen = partition(params, self.trainable)
        return dataclasses.replace(self._make(trained, hyper, seed), frozen=frozen)

    def _make(self, trained: PyTree, hyper: Hyper, seed: int) -> TrainState:
        opt_state, rng = self.optimizer.init(trained), jax.random.key(seed)
        return TrainState(jnp.int32(0), trained, opt_state, rng, hyper, running=self.running)

    def initial(self, params: PyTree, seed: int = 0, *, donate: bool = False) -> TrainState:
        """The state before the first step, laid out over the mesh.

        Args:
          params: host arrays, or arrays on the devices. What is frozen is not copied: no step writes over it.
          seed: of the random key.
          donate: whether the state may take over the memory of what is trained of ``params``, which must not be used
            afterwards.
        """

        def init(trained: PyTree, hyper: Hyper) -> TrainState:
            return self._make(trained if donate else jax.tree.map(jnp.copy, trained), hyper, seed)

        shardings = dataclasses.replace(self.shardings, frozen={})
        jitted = jax.jit(init, out_shardings=shardings, donate_argnums=(0,) if donate else ())
        trained, frozen = partition(placed(params, self.shardings.policy), self.trainable)
        return dataclasses.replace(jitted(trained, self.placed_hyper()), frozen=frozen)

    def placed_hyper(self) -> Hyper:
        """The state's numbers on the mesh."""
        return put_global(self.hyper, self.shardings.hyper)

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, to restore into or to compile for."""
        shapes = jax.eval_shape(lambda params: self.make(params, self.hyper, 0), abstract_params(self.config))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)


def state_layout(
    mesh: Mesh,
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    learning_rate: float = 1.0,
    trainable: Trainable = every,
    running: Running | None = None,
) -> StateLayout:
    """The layout over a mesh of a run's state."""
    hyper = Hyper(np.float32(beta), np.float32(learning_rate))  # type: ignore[arg-type]  # NumPy's
    running, everywhere = running or {}, replicated(mesh)
    trained, frozen = partition(param_shardings(mesh, config), trainable)
    shapes, _ = partition(abstract_params(config), trainable)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        jax.eval_shape(optimizer.init, shapes),
        trained,
        transform_non_params=lambda _: everywhere,
    )
    scalars = jax.tree.map(lambda _: everywhere, (hyper, running))
    shardings = TrainState(everywhere, trained, moments, everywhere, scalars[0], frozen, scalars[1])  # type: ignore[arg-type]
    return StateLayout(config, optimizer, hyper, running, trainable, shardings)
