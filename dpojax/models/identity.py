"""The identity of parameters: a content hash that is computed on the devices and is the same on every mesh."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt

from dpojax.models.params import flatten
from dpojax.types import PyTree

SEEDS = (0x9E3779B9, 0x27D4EB2F)  # odd, so that multiplying by them loses no bits


def fingerprint(params: PyTree) -> str:
    """A hash of a parameter tree's names, shapes, dtypes and values: 32 hexadecimal digits.

    Every element's bits are mixed with its position under two seeds, and the results are added up modulo 2^32. Integer
    sums do not depend on their order, so the hash is the same on every mesh, and no host needs the values. It tells
    parameters apart that differ by training or by accident; it is no defence against someone who looks for a collision.
    """
    return fingerprint_of(flatten(params))


def fingerprint_of(arrays: Mapping[str, Any]) -> str:
    """:func:`fingerprint` of arrays by any names."""
    digest = hashlib.blake2b(digest_size=16)
    flat = {name: jnp.asarray(x) for name, x in arrays.items()}
    places = tuple((x.shape, x.dtype, x.sharding) for x in flat.values())
    sums = dict(zip(flat, jax.device_get(_compiled(places)(list(flat.values()))), strict=True))
    for path, x in sorted(flat.items()):
        digest.update(f"{path} {x.shape} {x.dtype} {sums[path].tolist()}".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)  # a run computes that of its state again and again
def _compiled(places: tuple[tuple[tuple[int, ...], Any, jax.sharding.Sharding], ...]) -> Callable[..., Any]:
    """The function that adds up the mixed elements of arrays of these shapes, dtypes and shardings."""
    functions = [_sums_over_mesh(shape, sharding) for shape, _, sharding in places]
    return jax.jit(lambda arrays: [f(x) for f, x in zip(functions, arrays, strict=True)])


def _sums_over_mesh(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[[Array], UInt[Array, " 2"]]:
    """The function that adds up an array's mixed elements where they lie."""
    ndim = len(shape)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return functools.partial(_sums, shape=shape, starts=(0,) * ndim)
    mesh, spec = sharding.mesh, sharding.spec
    axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in (*spec, *[None] * ndim)][:ndim]
    assert isinstance(mesh, Mesh)

    def local(part: Array) -> UInt[Array, " 2"]:
        starts = tuple(jax.lax.axis_index(a) * n if a else 0 for a, n in zip(axes, part.shape, strict=True))
        return jax.lax.psum(_sums(part, shape=shape, starts=starts), [name for a in axes for name in a])

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)


def _sums(x: Array, *, shape: tuple[int, ...], starts: tuple[Any, ...]) -> UInt[Array, " 2"]:
    """The sums, one for each seed, of the mixed elements of a part of an array of this shape that begins there."""
    if x.ndim == 0:
        x, shape, starts = x[None], (1,), (0,)
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    rows = x if x.ndim > 1 else x[None]
    starts, strides = ((0, *starts), [0, *strides]) if x.ndim == 1 else (starts, strides)
    place = jnp.zeros(rows.shape[1:], jnp.uint32)
    for axis, (start, stride) in enumerate(zip(starts[1:], strides[1:], strict=True)):
        at = jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis) + jnp.uint32(start)
        place = place + at * jnp.uint32(stride)

    # Rows are added up elementwise before they are summed: XLA's CPU compiler reduces slowly.
    def add(i: Any, totals: list[Array]) -> list[Array]:
        at = place + (jnp.uint32(i) + jnp.uint32(starts[0])) * jnp.uint32(strides[0])
        return [total + _mixed(rows[i], at, seed) for total, seed in zip(totals, SEEDS, strict=True)]

    totals = jax.lax.fori_loop(0, rows.shape[0], add, [jnp.zeros_like(place) for _ in SEEDS])
    return jnp.stack([jnp.sum(total, dtype=jnp.uint32) for total in totals])


def _mixed(x: Array, position: Array, seed: int) -> Array:
    """MurmurHash3's finaliser (Appleby, public domain) of the elements' bits at their position."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    h = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    h = h ^ (position * jnp.uint32(seed) + jnp.uint32(seed >> 7))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
