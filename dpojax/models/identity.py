"""The identity of parameters: a content hash that is computed on the devices and is the same on every mesh."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
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
    digest = hashlib.blake2b(digest_size=16)
    flat = {path: jnp.asarray(x) for path, x in flatten(params).items()}
    sums = jax.device_get(_sums_of_all(flat))
    for path, x in sorted(flat.items()):
        digest.update(f"{path} {x.shape} {x.dtype} {sums[path].tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _sums_of_all(flat: dict[str, Array]) -> dict[str, Array]:
    return {path: _sums(x) for path, x in flat.items()}


def _sums(x: Array) -> UInt[Array, " 2"]:
    """The sums of the mixed elements, one for each seed."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # Stacked layers are added up elementwise before they are summed: XLA's CPU compiler reduces slowly.
    layers = bits if x.ndim > 2 else bits[None]
    position = jnp.zeros(layers.shape[1:], jnp.uint32)
    for axis, size in enumerate(position.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, position.shape, axis)

    def add(i: Any, totals: list[Array]) -> list[Array]:
        layer, at = layers[i], position + jnp.uint32(i) * jnp.uint32(position.size % 2**32)
        return [total + _mixed(layer, at, seed) for total, seed in zip(totals, SEEDS, strict=True)]

    totals = jax.lax.fori_loop(0, layers.shape[0], add, [jnp.zeros_like(position) for _ in SEEDS])
    return jnp.stack([jnp.sum(total, dtype=jnp.uint32) for total in totals])


def _mixed(bits: Array, position: Array, seed: int) -> Array:
    """MurmurHash3's finaliser (Appleby, public domain) of the bits at their position."""
    h = bits ^ (position * jnp.uint32(seed) + jnp.uint32(seed >> 7))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
