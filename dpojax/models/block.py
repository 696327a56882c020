"""One layer, for training and for sampling, and the seam through which every product with weights goes.

Optimization barriers are for XLA's CPU compiler; ``scripts/profile_step.py`` measures what they save.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dpojax.compiler import barrier
from dpojax.models.config import DecoderConfig, Norm
from dpojax.models.fewbits import dequantized
from dpojax.models.params import BACK
from dpojax.sharding import Constrain

Weights = Mapping[str, Any]
WHOLE, RESIDUAL = ("batch", "length", None), ("batch", "residual", None)
"""Where activations lie within a layer's halves, and where the residual stream lies between them."""
Cache = tuple[Array, Array] | None
Mix = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]
"""Queries, keys, values and the KV cache -> attention's outputs and the new KV cache."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@struct.dataclass
class Fused:
    """Several weights that are multiplied with the same input, as one matrix; ``shapes`` are the outputs' axes."""

    matrix: Float[Array, "F D"]
    bias: Float[Array, " F"] | None
    shapes: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)


@struct.dataclass
class Dropout:
    """What training sets to zero of the adapters' inputs: a share, drawn by a key of the layer's own."""

    key: Any  # an array of keys while layers are stacked; JAX puts other things there
    share: float = struct.field(pytree_node=False)


@struct.dataclass
class Flat:
    """A weight back to the model's width, its input axes merged."""

    matrix: Float[Array, "D F"]


def fused_name(names: Sequence[str]) -> str:
    """Where a layout keeps the weights of these names as one :class:`Fused` matrix."""
    return "+".join(names)


def project(weights: Weights, names: Sequence[str], x: Float[Array, "R T D"]) -> list[Array]:
    """Products of activations with the weights of these names, ``[R, T, *out]`` each, biases added.

    A weight is ``[D, *out]``. A layout may hold all of them as one matrix (:class:`Fused`).
    """
    fused = weights.get(fused_name(names))
    if isinstance(fused, Fused):
        y = jnp.einsum("rtd,fd->rtf", x, fused.matrix.astype(x.dtype))
        y = y if fused.bias is None else y + fused.bias.astype(x.dtype)[None, None]
        ends = np.cumsum([math.prod(shape) for shape in fused.shapes])
        parts = jnp.split(y, ends[:-1], axis=-1)
        return [part.reshape(*x.shape[:2], *shape) for part, shape in zip(parts, fused.shapes, strict=True)]
    products = {2: "rtd,df->rtf", 3: "rtd,dnh->rtnh"}
    each = ((name, weight(weights, name, x.dtype)) for name in names)
    outs = [_with_bias(weights, name, jnp.einsum(products[w.ndim], x, w)) for name, w in each]
    return [y + low_rank(weights, name, x, weights.get("dropout")) if adapted(weights, name) else y
            for name, y in zip(names, outs, strict=True)]  # fmt: skip


def weight(weights: Weights, name: str, dtype: Any) -> Array:
    """A weight in a compute dtype, dequantised where it has scales."""
    w, scale = weights[name], weights.get(f"{name}_scale")
    return (w if scale is None else dequantized(w, scale)).astype(dtype)


def adapted(weights: Weights, name: str) -> bool:
    """Whether a weight has an adapter beside it."""
    return f"{name}_lora_a" in weights


def low_rank(weights: Weights, name: str, x: Array, dropout: Dropout | None = None) -> Array:
    """``(x A) B`` of the adapter beside a weight, ``[R, T, *out]``; its scale is in A already.

    With dropout, elements of x are 0 with the probability of its share, and the others are divided by what is left.
    """
    a, b = weights[f"{name}_lora_a"].astype(x.dtype), weights[f"{name}_lora_b"].astype(x.dtype)
    if dropout is not None:
        key = jax.random.fold_in(dropout.key, zlib.crc32(name.encode()))
        kept = jax.random.bernoulli(key, 1 - dropout.share, x.shape)
        x = jnp.where(kept, x / (1 - dropout.share), 0)
    if x.ndim == 4:
        return jnp.einsum("rtk,dk->rtd", jnp.einsum("rtnh,knh->rtk", x, a), b)
    if name in BACK:
        return jnp.einsum("rtk,dk->rtd", jnp.einsum("rtf,kf->rtk", x, a), b)
    return jnp.einsum({2: "rtk,kf->rtf", 3: "rtk,knh->rtnh"}[b.ndim], jnp.einsum("rtd,dk->rtk", x, a), b)


def project_back(
    weights: Weights, name: str, x: Float[Array, "R T *in"], dropout: Dropout | None = None
) -> Float[Array, "R T D"]:
    """The product of activations with a weight ``[D, *in]`` back to the model's width, bias and adapter added."""
    w = weights[name]
    if isinstance(w, Flat):
        # The weights as first factor, which XLA's CPU compiler multiplies faster where the input is wide and tokens
        # are few. The barrier keeps it from exchanging the factors.
        product = jnp.einsum("df,rtf->drt", w.matrix.astype(x.dtype), x.reshape(*x.shape[:2], -1))
        y = jax.lax.optimization_barrier(product).transpose(1, 2, 0)
    else:
        y = jnp.einsum({2: "rtf,df->rtd", 3: "rtnh,dnh->rtd"}[w.ndim], x, weight(weights, name, x.dtype))
    y = y + low_rank(weights, name, x, dropout) if adapted(weights, name) else y
    return _with_bias(weights, name, y)


def _with_bias(weights: Weights, name: str, y: Array) -> Array:
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "R T D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "R T D"]:
    """``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich 2019, arXiv 1910.07467), the mean in float32.

    The backward pass is written by hand, with n the normalised x and r the root's reciprocal:
    ``dx = r * (dy * scale - n * mean(dy * scale * n))``.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple]:
    x32 = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * r).astype(x.dtype) * scale.astype(x.dtype)[None, None], (x, r, scale)


def _rms_norm_backward(eps: float, kept: tuple, dy: Array) -> tuple[Array, Array]:
    x, r, scale = kept
    n, dy = x.astype(jnp.float32) * r, dy.astype(jnp.float32)
    # The sums are matrix products with vectors, which XLA's CPU compiler makes faster than reductions.
    product = barrier(dy * n)
    scale32 = scale.astype(jnp.float32)
    dscale = jnp.einsum("rt,rtd->d", jnp.ones(x.shape[:2]), product)
    mean = jnp.einsum("rtd,d->rt", product, scale32 / x.shape[-1])[..., None]
    dx = r * (dy * scale32[None, None] - n * mean)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def layer_norm(
    x: Float[Array, "R T D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, eps: float
) -> Float[Array, "R T D"]:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` (Ba et al. 2016, arXiv 1607.06450), in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = y * scale.astype(jnp.float32)[None, None]
    return (y if bias is None else y + bias.astype(jnp.float32)[None, None]).astype(x.dtype)


def normalize(norm: Norm, weights: Weights, name: str, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
    """The activations under the norm of this name."""
    scale = weights[name] + norm.offset if norm.offset else weights[name]
    if norm.kind == "rms":
        return rms_norm(x, scale, norm.eps)
    return layer_norm(x, scale, weights.get(f"{name}_bias"), norm.eps)


def normalize_heads(norm: Norm, weights: Weights, name: str, x: Float[Array, "R T N h"]) -> Float[Array, "R T N h"]:
    """Every head under the norm of this name, which all heads share; or all heads together, where it has them all."""
    if weights[name].ndim == 2:
        flat = {name: weights[name].reshape(-1)}
        return normalize(norm, flat, name, x.reshape(*x.shape[:2], -1)).reshape(x.shape)
    return jax.vmap(lambda head: normalize(norm, weights, name, head), in_axes=2, out_axes=2)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate_and_project(
    act: str, inputs: tuple[Array, ...], weights: Weights, dropout: Dropout | None = None
) -> Float[Array, "R T D"]:
    """``down(act(a) * b)`` of the gated MLP's two projections, ``down(act(a))`` of one.

    The backward pass is written by hand: it keeps the projections alone and computes all that is elementwise in one go.
    """
    return project_back(weights, "down", _activate(act, inputs), dropout)


def _activate(act: str, inputs: tuple[Array, ...]) -> Array:
    h = ACTIVATIONS[act](inputs[0])
    return h * inputs[1] if len(inputs) == 2 else h


def _activate_and_project_forward(
    act: str, inputs: tuple[Array, ...], weights: Weights, dropout: Dropout | None
) -> tuple[Array, tuple]:
    return activate_and_project(act, inputs, weights, dropout), (inputs, weights, dropout)


def _activate_and_project_backward(act: str, kept: tuple, do: Array) -> tuple[tuple[Array, ...], Weights, None]:
    inputs, weights, dropout = kept
    # The product is linear in h, so its gradient by h needs no h.
    (dh,) = jax.linear_transpose(lambda h: project_back(_without_bias(weights), "down", h, dropout), inputs[0])(do)
    # The first barrier keeps XLA from keeping the forward pass's activation; the second keeps its CPU compiler from
    # computing these inside of the products' transpositions, element by element.
    inputs, dh = barrier((inputs, dh))
    h, back = jax.vjp(lambda inputs: _activate(act, inputs), inputs)
    h, dinputs = barrier((h, back(dh)[0]))
    dweights = jax.vjp(lambda weights: project_back(weights, "down", h, dropout), weights)[1](do)[0]
    return dinputs, dweights, None


def _without_bias(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if not name.endswith("_bias")}


activate_and_project.defvjp(_activate_and_project_forward, _activate_and_project_backward)


def mlp(config: DecoderConfig, weights: Weights, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
    """The feed-forward half of a layer (:class:`~dpojax.models.config.Mlp`)."""
    inputs = checkpoint_name(project(weights, ("gate", "up") if config.mlp.gated else ("up",), x), "mlp")
    down = {name: w for name, w in weights.items() if name.startswith("down")}
    return activate_and_project(config.mlp.act, tuple(inputs), down, weights.get("dropout"))


Feed = Callable[[DecoderConfig, Weights, Array], Array]
"""The feed-forward half of a layer, of its choices, its weights and the residual stream."""


def attention(
    config: DecoderConfig, weights: Weights, x: Float[Array, "R T D"], mix: Mix, cache: Cache
) -> tuple[Float[Array, "R T D"], Cache]:
    """The attention half of a layer, and its KV cache."""
    q, k, v = project(weights, ("q", "k", "v"), x)
    if config.attention.qk_norm is not None:
        q = normalize_heads(config.attention.qk_norm, weights, "q_norm", q)
        k = normalize_heads(config.attention.qk_norm, weights, "k_norm", k)
    if config.attention.scale is not None:  # kernels multiply scores with head_dim ** -0.5
        q = q * jnp.asarray(config.attention.scale * config.attention.head_dim**0.5, q.dtype)
    out, cache = mix(q, k, v, cache)
    return checkpoint_name(project_back(weights, "o", out, weights.get("dropout")), "o"), cache


def block(
    config: DecoderConfig,
    weights: Weights,
    x: Float[Array, "R T D"],
    mix: Mix,
    cache: Cache = None,
    feed: Feed = mlp,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "R T D"], Cache]:
    """One layer's output and its KV cache.

    Args:
      config: the decoder's choices.
      weights: this layer's tensors (:func:`~dpojax.models.params.layer_specs`), in any layout that ``project`` reads.
      x: the residual stream.
      mix: rotary positions and attention over tokens.
      cache: keys and values of earlier tokens; None in training.
      feed: the feed-forward half: an MLP, or a mixture of experts.
      constrain: pins activations to their place on a mesh whose devices split a layer: between its halves the residual
        stream is split by length, and within them heads and MLP are (sequence parallelism, Korthikanti et al. 2022,
        arXiv 2205.05198). None: no device splits a layer.
    """

    def norm(name: str, x: Array) -> Array:
        return normalize(config.norm, weights, name, x)

    # Each crossing names the places on both of its sides, which are those of its gradient too.
    def enter(x: Array) -> Array:
        return x if constrain is None else constrain(constrain(x, RESIDUAL), WHOLE)

    def leave(x: Array) -> Array:
        return x if constrain is None else constrain(constrain(x, WHOLE), RESIDUAL)

    before, after = config.residual != "post", config.residual in ("post", "pre_post")
    normed = enter(norm("attn_norm", x) if before else x)
    out, cache = attention(config, weights, normed, mix, cache)
    out = leave(out)
    if config.residual == "parallel_shared":
        return x + out + leave(feed(config, weights, normed)), cache
    if config.residual == "parallel":
        return x + out + leave(feed(config, weights, enter(norm("mlp_norm", x)))), cache
    x = x + (norm("attn_post_norm", out) if after else out)
    out = leave(feed(config, weights, enter(norm("mlp_norm", x) if before else x)))
    return x + (norm("mlp_post_norm", out) if after else out), cache
