"""Weights between files and the mesh: slices of files straight into sharded arrays, and sharded arrays into files.

No host holds more than a few tensors beyond what its devices hold.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.dequantize import RawTensors
from dpojax.models.families import Family, Tensor
from dpojax.models.families.base import join, output_axis
from dpojax.models.params import flatten, layer_specs, layers_with, nest, param_specs
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


class UnderBase:
    """Tensors of a bare decoder's files, as GPT-2's on the hub, by the names that they have in a model with a head.

    Args:
      source: the files' tensors.
      base: what the names lack at their beginning, as in ``transformer.``.
    """

    def __init__(self, source: RawTensors, base: str):
        self.path, self.source = source.path, source
        self.stored = {name if name in HEADS else base + name: name for name in source.names}
        self.names = list(self.stored)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.source.shape(self.stored[name]) if name in self.stored else None

    def dtype(self, name: str) -> str:
        return self.source.dtype(self.stored[name])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.source.read(self.stored[name], index)


HEADS = frozenset(("lm_head.weight", "lm_head.bias", "embed_out.weight", "score.weight"))
"""What lies outside of a model's decoder."""


def under_base(source: RawTensors, family: Family) -> RawTensors:
    """The source, whose tensors have the names that they have in a model with a head."""
    embed = family.tensors["embed"].name
    base, bare = embed.split(".", 1)
    return UnderBase(source, f"{base}.") if embed not in source.names and bare in source.names else source


@dataclasses.dataclass(frozen=True)
class Placed:
    """One parameter's place in a family's files.

    Attributes:
      tensor: its name and form.
      shape: of one of the tensors that the parameter is stacked of.
      numbers: what the stacked axes count, in their order: the layers that have it, and its experts; empty for a
        parameter of no layer.
      start: where it begins along the output axis of a fused tensor.
      whole: shape of the tensor that holds it.
      heads: how many of its heads lie between those of other parameters in the same tensor.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    numbers: tuple[tuple[int, ...], ...]
    start: int
    whole: tuple[int, ...]
    heads: int

    @property
    def layers(self) -> int | None:
        """How many layers have it; None for a parameter of no layer."""
        return len(self.numbers[0]) if self.numbers else None

    @property
    def fused(self) -> bool:
        """Whether its tensor holds other parameters too."""
        return self.whole != self.tensor.shape(self.shape)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts the parameters that lie in one tensor."""
        return self.start, 0 if self.tensor.of_head is None else self.tensor.of_head[0]

    def name(self, layer: int = 0) -> str:
        """The name of its tensor in a layer."""
        return self.tensor.name.format(layer)

    def names(self) -> Iterator[str]:
        """The names of the tensors that it is stacked of."""
        return (self.tensor.name.format(*at) for at in itertools.product(*self.numbers))


def places(family: Family, config: DecoderConfig) -> dict[str, Placed]:
    """Where a family's files keep every parameter of a decoder, by path."""
    inner, specs, out = layer_specs(config), param_specs(config), {}

    def shape_of(path: str) -> tuple[int, ...]:
        if not path.startswith("blocks/"):
            return specs[path].shape
        shape = inner[path.removeprefix("blocks/")].shape
        return shape[1:] if path.startswith("blocks/experts_") else shape

    for path in specs:
        tensor, shape = family.tensors[path], shape_of(path)
        start = sum(tensor.outputs(shape_of(f"blocks/{name}")) for name in tensor.after)
        together = [p for p in specs if family.tensors[p].name == tensor.name]
        whole = list(tensor.shape(shape))
        whole[output_axis(tensor, tuple(whole))] = sum(family.tensors[p].outputs(shape_of(p)) for p in together)
        name, stacked = path.removeprefix("blocks/"), path.startswith("blocks/")
        numbers = (layers_with(config, name),) if stacked else ()
        if config.experts is not None and name.startswith("experts_"):
            numbers = (*numbers, tuple(range(config.experts.number)))
        heads = shape[-2] if tensor.of_head is not None else 1
        out[path] = Placed(tensor, shape, numbers, start, tuple(whole), heads)
    return out


def check_source(source: TensorSource, family: Family, config: DecoderConfig) -> None:
    """Refuse files whose tensors do not fit the config, before any is read.

    Raises:
      UserError: a tensor is missing, has another shape than the config asks for, or there are more layers.
    """
    if source.shape(family.tensors["blocks/o"].name.format(config.layers)) is not None:
        raise UserError(
            f"{source.path}: config.json has {config.layers} layers, the weights have more; fix config.json"
        )
    for place in places(family, config).values():
        for name in place.names():
            shape = source.shape(name)
            if shape is None:
                raise UserError(f"{source.path}: tensor {name} is missing from its weights; fetch the model again")
            if shape != place.whole:
                raise UserError(
                    f"{source.path}: tensor {name} has shape {shape}, but its config.json asks for {place.whole}"
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
        small = 4 * math.prod(spec.shape) <= AT_ONCE or not where[path].numbers
        made = (
            jax.make_array_from_callback if small else functools.partial(stacked_on_devices, len(where[path].numbers))
        )
        out[path] = made(spec.shape, sharding, read)
        done += math.prod(spec.shape)
        progress(done / total)
    return nest(out)


AT_ONCE = 64 << 20
"""Bytes of a parameter up to which its layers are stacked on the host."""


def stacked_on_devices(
    stacked: int,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """A parameter of several tensors, which are put into it where it lies, one after another; the host never holds
    more than one of them.

    Args:
      stacked: axes that count tensors, the first ones.
      shape: of the parameter.
      sharding: where it lies.
      read: gives a slice of it, float32.
    """
    places = sharding.addressable_devices_indices_map(shape)
    parts = {device: jnp.zeros(sharding.shard_shape(shape), jnp.float32, device=device) for device in places}
    alike: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # devices that hold the same slice
    for device, index in places.items():
        assert index is not None
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        alike.setdefault(bounds, []).append(device)
    for bounds, devices in alike.items():
        whole = tuple(slice(*bound) for bound in bounds[stacked:])
        for at in itertools.product(*(range(*bound) for bound in bounds[:stacked])):
            x = read((*(slice(i, i + 1) for i in at), *whole))
            start = np.array([i - bound[0] for i, bound in zip(at, bounds[:stacked], strict=True)], np.int32)
            for device in devices:
                parts[device] = _put(parts[device], jax.device_put(x, device), start)
            jax.block_until_ready([parts[device] for device in devices])  # else what was read piles up
    return jax.make_array_from_single_device_arrays(shape, sharding, [parts[device] for device in places])


@functools.partial(jax.jit, donate_argnums=0)
def _put(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """The array with a part of it written over, in its own memory."""
    rest = [jnp.int32(0)] * (x.ndim - start.shape[0])
    return jax.lax.dynamic_update_slice(x, part, [*start, *rest])


def read_slice(source: TensorSource, place: Placed, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one parameter, float32, from the slices of the files that hold it."""
    wanted = tuple(len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True))
    tensor, stacked = place.tensor, len(place.numbers)
    part = tensor.index(place.shape, index[stacked:], place.start)
    if not stacked:
        (name,) = place.names()
        return np.ascontiguousarray(tensor.to_ours(source.read(name, part), wanted), np.float32)
    x = np.empty(wanted, np.float32)
    rows = [list(enumerate(numbers[cut])) for numbers, cut in zip(place.numbers, index, strict=False)]
    for at in itertools.product(*rows):
        name = tensor.name.format(*(number for _, number in at))
        x[tuple(i for i, _ in at)] = tensor.to_ours(source.read(name, part), wanted[stacked:])
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
    parts: dict[tuple[int, str], list[tuple[str, tuple[int, ...]]]] = {}  # what lies in a tensor: path, place in stack
    for path, place in where.items():
        axes = [list(enumerate(numbers)) for numbers in place.numbers]
        for at in itertools.product(*axes):
            numbers = tuple(number for _, number in at)
            key = (numbers[0] if numbers else -1), place.tensor.name.format(*numbers)
            parts.setdefault(key, []).append((path, tuple(i for i, _ in at)))
    for (_, name), held in sorted(parts.items(), key=lambda item: item[0][0]):
        yield file_tensor(name, sorted(held, key=lambda part: where[part[0]].order), flat, where)


def file_tensor(
    name: str, held: Sequence[tuple[str, tuple[int, ...]]], flat: Mapping[str, Any], where: Mapping[str, Placed]
) -> FileTensor:
    """One tensor of a model's files, of the parameters that it holds.

    Args:
      name: of the tensor.
      held: the parameters' paths, in their order, and where each stands in its stack.
      flat: the parameters by path.
      where: their places.
    """
    first = where[held[0][0]]

    def fetch() -> np.ndarray:
        tensors = [where[path].tensor for path, _ in held]
        parts = [np.asarray(gathered(flat[path][at] if at else flat[path])) for path, at in held]
        return join(tensors, [t.to_theirs(x) for t, x in zip(tensors, parts, strict=True)], first.heads)

    return FileTensor(name, first.whole, fetch)


def gathered(x: Any) -> Any:
    """The array whole on every device, so that one process can read it."""
    if isinstance(x, jax.Array) and not x.is_fully_replicated and isinstance(x.sharding, NamedSharding):
        return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return x
