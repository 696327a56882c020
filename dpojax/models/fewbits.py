"""Frozen weights in few bits, by Qwix: 8-bit integers with a scale an output, or NF4 with a scale a block."""

import importlib.util
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dpojax.errors import UserError
from dpojax.models.config import DecoderConfig
from dpojax.models.params import ADAPTABLE, BACK, NF4_BLOCK, flatten, nest, param_specs
from dpojax.sharding import RULES
from dpojax.types import PyTree


def check_qwix() -> None:
    """Refuse to go on without Qwix, before anything is read.

    Raises:
      UserError: it says how to install it.
    """
    if importlib.util.find_spec("qwix") is None:
        raise UserError("--quantize-base: the package qwix is not installed; pip install 'dpojax[quantize]'")


def quantized(config: DecoderConfig, params: PyTree, mesh: Mesh | None = None) -> PyTree:
    """A base's parameters with its layers' weights as ``config.quantized`` says, one after another.

    Each weight's float32 array is deleted when it has been quantised; the others are the arrays themselves.

    Args:
      config: the choices with ``quantized`` set.
      params: float32; used no more.
      mesh: where they lie.
    """
    if config.quantized == "none":
        return params
    flat, specs = flatten(params), param_specs(config.base)
    for name in ADAPTABLE:
        if (path := f"blocks/{name}") in flat:
            paths = path, f"{path}_scale"
            placed = mesh and tuple(NamedSharding(mesh, RULES.spec(specs[p].axes)) for p in paths)
            whole = flat[path]
            quantize = jax.jit(_quantize, static_argnames=("kind", "back"), out_shardings=placed)
            flat[path], flat[f"{path}_scale"] = quantize(whole, kind=config.quantized, back=name in BACK)
            whole.delete()
    return nest(flat)


def _quantize(w: Array, *, kind: str, back: bool) -> tuple[Array, Array]:
    import qwix

    if kind == "nf4":
        others = tuple(axis for axis in range(w.ndim) if axis != 1)
        q = qwix.quantize(w, "nf4", channelwise_axes=others, tiled_axes={1: math.gcd(w.shape[1], NF4_BLOCK)})
    else:
        q = qwix.quantize(w, jnp.int8, channelwise_axes=(0, 1) if back else (0, *range(2, w.ndim)))
    return q.qvalue, q.scale.astype(jnp.float32)


def dequantized(values: Array, scale: Array) -> Array:
    """A weight, float32, from its numbers and their scales."""
    import qwix

    kind = "nf4" if values.dtype == jnp.uint4 else "int8"
    return qwix.dequantize(qwix.QArray(values, scale, None, kind))


def restored(config: DecoderConfig, params: PyTree) -> PyTree:
    """The parameters of ``config.merged`` but for the adapter: quantised weights in float32, their scales gone."""
    if config.quantized == "none":
        return params
    flat = flatten(params)
    for name in ADAPTABLE:
        if (scale := flat.pop(f"blocks/{name}_scale", None)) is not None:
            flat[f"blocks/{name}"] = jax.jit(dequantized)(flat[f"blocks/{name}"], scale)
    return nest(flat)
