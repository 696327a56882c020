"""The mesh, and which mesh axis each logical axis of an array is split over."""

import dataclasses
import math
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
    residual: MeshAxes = "tensor"
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


MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 96}
"""Memory of a device, in GiB, by ``device_kind``, for those that are not there to be asked; of a TPU7x, that of one of
a chip's two devices. Source: Google Cloud's pages of each TPU version."""
SHARE = 0.25
"""Of a device's memory that the state of training may take; activations and gathered weights need the rest."""


def memory_of(device: jax.Device) -> float:
    """Bytes of a device's memory; infinite where nobody says, as of a CPU."""
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # of a device that is compiled for, and not there
        stats = None
    known = (stats or {}).get("bytes_limit")
    return float(known or MEMORY.get(device.device_kind, math.inf) * 2**30)


def auto_mesh(
    config: MeshConfig, devices: Sequence[jax.Device], bytes_per_copy: float, share: float = SHARE
) -> MeshConfig:
    """The mesh for a model, where ``--mesh.data auto`` leaves it open: a copy of the model on every device, or, where
    what a copy holds would take more than a share of a device's memory, one that all devices share, or those of a
    slice, whose links are fast.

    Args:
      config: what is asked for; sizes that are given stay.
      devices: those to use.
      bytes_per_copy: parameters, gradients, optimizer state and, where one is held, reference
        (:func:`~dpojax.train.program.bytes_per_copy`).
      share: of a device's memory.
    """
    if config.data != "auto" or -1 in (config.fsdp, config.tensor):
        return config
    rest, slices = len(devices) // max(config.tensor, 1), slices_of(devices)
    if config.fsdp != 1 or rest < 1:
        return dataclasses.replace(config, data=-1)
    room = share * min(memory_of(device) for device in devices) * max(config.tensor, 1)
    shared = bytes_per_copy > room
    return dataclasses.replace(config, data=-1, fsdp=max(rest // slices, 1) if shared else 1)


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many slices of TPUs the devices are; those of one are joined by fast links, slices by the network."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def ordered(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of (data, fsdp, tensor), neighbours along fast links: of several slices, each is a part
    of the axis ``data``, whose gradients are all that goes over the network.

    Raises:
      UserError: the slices do not divide the axis ``data``.
    """
    data, *others = sizes
    slices = slices_of(devices)
    # Devices in their order of numbers ignore a TPU's links; this orders them along the torus.
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    if data % slices:
        raise UserError(f"--mesh.data: {data} copies do not divide over {slices} slices; use a multiple")
    each, over = (data // slices, *others), (slices, *[1] * len(others))
    return mesh_utils.create_hybrid_device_mesh(each, over, devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices as a mesh of (data, fsdp, tensor), neighbours along fast links where devices have links.

    Args:
      config: devices along each axis; one of them may be -1, for the rest. Where no model is known (:func:`auto_mesh`),
        ``auto`` is the rest too, if no other axis is.
      devices: those to use (default: all of JAX's default kind).

    Raises:
      UserError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    asked = dataclasses.asdict(config)
    sizes: dict[str, int] = {
        **asked,
        "data": (1 if -1 in asked.values() else -1) if config.data == "auto" else config.data,
    }
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise UserError(f"--mesh: {tuple(sizes.values())} is no mesh; one axis may be -1, the others are above 0")
    if free:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        flags = " x ".join(f"{axis} {n}" for axis, n in asked.items())
        raise UserError(f"--mesh: {flags} does not fit {len(devices)} devices; make the product equal their number")
    return Mesh(ordered(tuple(sizes.values()), devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def described(mesh: Mesh) -> str:
    """A mesh in words, for the console."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


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
    """A function that pins an activation to its place on the mesh; the identity on one device.

    A dimension that the devices do not divide is not split.
    """
    if mesh.size == 1:
        return lambda x, axes: x

    def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
        parts = (math.prod(mesh.shape[name] for name in RULES.mesh_axes(axis)) if axis else 1 for axis in axes)
        kept = tuple(axis if n % part == 0 else None for axis, n, part in zip(axes, x.shape, parts, strict=True))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, RULES.spec(kept)))

    return constrain


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
