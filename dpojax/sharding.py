"""The mesh, and which mesh axis each logical axis of an array is split over."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Constrain, param_axes
from dpojax.types import PyTree

MeshAxes = str | tuple[str, ...] | None


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
    vocab: MeshAxes = "tensor"

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))


RULES = Rules()


def make_mesh(config: MeshConfig, model: DecoderConfig | None = None, rows: int | None = None) -> Mesh:
    """The devices as a mesh of (data, fsdp, tensor).

    Args:
      config: devices along each axis; one of them may be -1, for the rest.
      model: checked to divide evenly.
      rows: pairs computed side by side, checked to divide evenly.

    Raises:
      UserError: the sizes do not fit the devices, the model or the batch.
    """
    devices = jax.devices()
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
    for dimension, axis in (("heads", "tensor"), ("kv_heads", "tensor"), ("mlp_width", "tensor"), ("width", "fsdp")):
        if model is not None and getattr(model, dimension) % sizes[axis]:
            n = getattr(model, dimension)
            raise UserError(f"--mesh.{axis}: {sizes[axis]} does not divide the model's {dimension}, {n}; use a divisor")
    if model is not None and model.vocab_size % sizes["tensor"]:
        raise UserError(f"--mesh.tensor: {sizes['tensor']} does not divide the vocabulary, {model.vocab_size}")
    if rows is not None and rows % (sizes["data"] * sizes["fsdp"]):
        split = sizes["data"] * sizes["fsdp"]
        raise UserError(f"--batch-size: {rows} pairs side by side do not divide over {split} devices; use a multiple")
    shape = tuple(sizes.values())
    grid = np.array(devices).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, RULES.spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return mesh.size // mesh.shape["tensor"]


def param_shardings(mesh: Mesh, config: DecoderConfig) -> PyTree:
    """A sharding for every parameter, in the parameters' structure."""
    to_sharding = lambda axes: NamedSharding(mesh, RULES.spec(axes))  # noqa: E731
    return jax.tree.map(to_sharding, param_axes(config), is_leaf=lambda x: isinstance(x, tuple))


def constrainer(mesh: Mesh) -> Constrain:
    """A function that pins an activation to its place on the mesh; the identity on one device."""
    if mesh.size == 1:
        return lambda x, axes: x
    return lambda x, axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, RULES.spec(axes)))


def put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays, whole and equal on every process, to arrays laid out over the mesh."""

    def put(x: np.ndarray, sharding: NamedSharding) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put(x, shardings), tree)
    return jax.tree.map(put, tree, shardings)
