"""The mesh, and which mesh axis each logical axis of an array is split over."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.types import PyTree

MeshAxes = str | tuple[str, ...] | None
Constrain = Callable[[Array, tuple[str | None, ...]], Array]
"""Pins an activation, whose dimensions are these logical axes, to its place on the mesh."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Parameters are split over `fsdp` by width and over `tensor` within a layer."""

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = None
    layers: MeshAxes = None
    embed: MeshAxes = "fsdp"
    norm: MeshAxes = None
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    experts: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over, none or several."""
        axes = getattr(self, axis)
        return () if axes is None else (axes,) if isinstance(axes, str) else axes

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ValueError: two of its dimensions would be split over one mesh axis.
        """
        used = [name for axis in axes if axis is not None for name in self.mesh_axes(axis)]
        if len(set(used)) < len(used):
            raise ValueError(f"logical axes {axes} are split over mesh axes {used}, one of them twice")
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))


RULES = Rules()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices as a mesh of (data, fsdp, tensor), neighbours along fast links where devices have links.

    Args:
      config: devices along each axis; one of them may be -1, for the rest.
      devices: those to use (default: all of JAX's default kind).

    Raises:
      UserError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise UserError(f"--mesh: {tuple(sizes.values())} is no mesh; one axis may be -1, the others are above 0")
    if free:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        flags = " x ".join(f"{axis} {n}" for axis, n in dataclasses.asdict(config).items())
        raise UserError(f"--mesh: {flags} does not fit {len(devices)} devices; make the product equal their number")
    # Devices in their order of numbers ignore a TPU's links; this orders them along the torus.
    ordered = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(ordered, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def single_device_mesh() -> Mesh:
    """A mesh of JAX's first device."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuse a batch that does not divide over the devices that split it.

    Raises:
      UserError: naming the flag, its value and the number of devices.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"--batch-size: {batch_size} pairs side by side do not divide over {shards} devices; use a multiple"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, RULES.spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return mesh.size // mesh.shape["tensor"]


def constrainer(mesh: Mesh) -> Constrain:
    """A function that pins an activation to its place on the mesh; the identity on one device."""
    if mesh.size == 1:
        return lambda x, axes: x
    return lambda x, axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, RULES.spec(axes)))


def put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays laid out over the mesh, from host arrays that are whole and equal on every process."""

    def put(x: np.ndarray, sharding: NamedSharding) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put(x, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def held_sequences(mesh: Mesh, sequences: int) -> list[int]:
    """The packed sequences, of a global batch's, whose rows this process's devices hold, in order."""
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((sequences,)).values()
    return sorted({i for (part,) in parts for i in range(*part.indices(sequences))})


def put_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays over the mesh, split by their first axis, from the rows that this process's devices hold.

    Every process gives its own part: the rows of :func:`held_sequences`, one sequence's after another's.
    """
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)
    held = held_sequences(mesh, shards)

    def put(x: np.ndarray) -> Array:
        x = np.asarray(x)
        each = len(x) // len(held)

        def part(index: Any) -> np.ndarray:
            at = held.index((index[0].start or 0) // each) * each
            return x[at : at + each]

        return jax.make_array_from_callback((each * shards, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)
