"""Weights between files and the mesh: slices of files straight into sharded arrays, and sharded arrays into files.

No host holds more than a few tensors beyond what its devices hold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.families import Family, Tensor
from dpojax.models.params import flatten, layer_specs, nest, param_specs
from dpojax.sharding import RULES, single_device_mesh
from dpojax.types import PyTree

Progress = Callable[[float], None]


@runtime_checkable
class TensorSource(Protocol):
    """Tensors of a model's files by Hugging Face's name."""

    path: Any

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None where there is no such tensor."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in a dtype that NumPy can cast to float32."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """One parameter's place in a family's files: its tensor, its shape without layers, the layers, and where it begins
    along the output axis of a fused tensor."""

    tensor: Tensor
    shape: tuple[int, ...]
    layers: int | None  # None: not of a layer
    start: int
    fused: bool

    def name(self, layer: int = 0) -> str:
        return self.tensor.name.format(layer)


def places(family: Family, config: DecoderConfig) -> dict[str, Placed]:
    """Where a family's files keep every parameter of a decoder, by path."""
    inner, out = layer_specs(config), {}
    for path, spec in param_specs(config).items():
        tensor, stacked = family.tensors[path], path.startswith("blocks/")
        shape = inner[path.removeprefix("blocks/")].shape if stacked else spec.shape
        start = sum(tensor.outputs(inner[name].shape) for name in tensor.after)
        fused = any(other.after for other in family.tensors.values() if other.name == tensor.name)
        out[path] = Placed(tensor, shape, config.layers if stacked else None, start, fused)
    return out


def check_source(source: TensorSource, family: Family, config: DecoderConfig) -> None:
    """Refuse files whose tensors do not fit the config, before any is read.

    Raises:
      UserError: a tensor is missing, has another shape than the config asks for, or there are more layers.
    """
    if source.shape(family.tensors["blocks/q"].name.format(config.layers)) is not None:
        raise UserError(
            f"{source.path}: config.json has {config.layers} layers, the weights have more; fix config.json"
        )
    for place in places(family, config).values():
        wanted = place.tensor.shape(place.shape)
        for layer in range(place.layers or 1):
            name = place.name(layer)
            shape = source.shape(name)
            if shape is None:
                raise UserError(f"{source.path}: tensor {name} is missing from its weights; fetch the model again")
            if shape != wanted and not place.fused:
                raise UserError(
                    f"{source.path}: tensor {name} has shape {shape}, but its config.json asks for {wanted}"
                )


def load_params(
    source: TensorSource,
    family: Family,
    config: DecoderConfig,
    mesh: Mesh | None = None,
    progress: Progress = lambda share: None,
) -> PyTree:
    """A model's parameters, float32 arrays born on the mesh, from slices of its files.

    Args:
      source: the files' tensors.
      family: names and forms of the tensors.
      config: the decoder's choices.
      mesh: where the parameters lie (default: whole, on JAX's first device).
      progress: called with the share that is read, from 0 to 1.

    Raises:
      UserError: a tensor is missing or does not fit the config.
    """
    check_source(source, family, config)
    mesh = mesh or single_device_mesh()
    specs, where, out = param_specs(config), places(family, config), {}
    total, done = sum(math.prod(spec.shape) for spec in specs.values()), 0
    for path, spec in specs.items():
        sharding = NamedSharding(mesh, RULES.spec(spec.axes))
        read = functools.partial(read_slice, source, where[path], spec.shape)
        out[path] = jax.make_array_from_callback(spec.shape, sharding, read)
        done += math.prod(spec.shape)
        progress(done / total)
    return nest(out)


def read_slice(source: TensorSource, place: Placed, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one parameter, float32, from the slices of the files that hold it."""
    wanted = tuple(len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True))
    tensor = place.tensor
    if place.layers is None:
        part = tensor.index(place.shape, index, place.start)
        return np.ascontiguousarray(tensor.to_ours(source.read(place.name(), part), wanted), np.float32)
    part = tensor.index(place.shape, index[1:], place.start)
    x = np.empty(wanted, np.float32)
    for i, layer in enumerate(range(*index[0].indices(place.layers))):
        x[i] = tensor.to_ours(source.read(place.name(layer), part), wanted[1:])
    return x


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a model's files: its name, its shape, and a function that fetches it from the devices."""

    name: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def file_tensors(params: PyTree, family: Family, config: DecoderConfig) -> Iterator[FileTensor]:
    """Every tensor of a model's files, not fetched yet: those of no layer first, then layer by layer."""
    flat, where = flatten(params), places(family, config)
    for layer in (None, *range(config.layers)):
        parts: dict[str, list[str]] = {}  # paths of the parameters that one tensor holds
        for path, place in where.items():
            if (place.layers is None) == (layer is None):
                parts.setdefault(place.name(layer or 0), []).append(path)
        for name, paths in parts.items():
            yield file_tensor(name, sorted(paths, key=lambda path: where[path].start), flat, where, layer)


def file_tensor(
    name: str, paths: list[str], flat: Mapping[str, Any], where: Mapping[str, Placed], layer: int | None
) -> FileTensor:
    """One tensor of a model's files, of the parameters that it holds in their order.

    Args:
      name: of the tensor.
      paths: of the parameters.
      flat: the parameters by path.
      where: their places.
      layer: the layer, of parameters that are stacked; None: they are not.
    """
    shapes = [where[path].tensor.shape(where[path].shape) for path in paths]
    axis = 0 if where[paths[0]].tensor.outputs_first or len(shapes[0]) == 1 else 1  # of the outputs
    shape = list(shapes[0])
    shape[axis] = sum(part[axis] for part in shapes) if len(shapes) > 1 else shape[axis]

    def fetch() -> np.ndarray:
        parts = (flat[path] if layer is None else flat[path][layer] for path in paths)
        out = [where[path].tensor.to_theirs(np.asarray(gathered(x))) for path, x in zip(paths, parts, strict=True)]
        return out[0] if len(out) == 1 else np.concatenate(out, axis)

    return FileTensor(name, tuple(shape), fetch)


def gathered(x: Any) -> Any:
    """The array whole on every device, so that one process can read it."""
    if isinstance(x, jax.Array) and not x.is_fully_replicated and isinstance(x.sharding, NamedSharding):
        return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return x
