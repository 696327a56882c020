"""One decoder for every family: embed, scan over the layers, final norm; pure functions of parameters and tokens."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention import MakeAttention, rope_table, rotate, shared_prompt_attention
from dpojax.models.block import Cache, Mix, Weights, block, normalize
from dpojax.models.config import DecoderConfig, LayerKind, Learned, Rope
from dpojax.models.lora import switched_on
from dpojax.packing import ApplyFn, ModelInput
from dpojax.sharding import Constrain
from dpojax.types import Head, PyTree, Unembedding

MixOfKind = Callable[[LayerKind], Mix]

REMAT = {
    "none": None,  # keep every activation: fastest, most memory
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products with weights only
    "block": jax.checkpoint_policies.nothing_saveable,  # keep one activation a layer: slowest, least memory
}
"""What the backward pass recomputes, by name."""


def embed(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "R T"], positions: Int[Array, "R T"]
) -> Float[Array, "R T D"]:
    """The residual stream before the first layer."""
    x = params["embed"][tokens]
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return x + params["positions"][positions] if isinstance(config.positions, Learned) else x


def rotary_mix(
    config: DecoderConfig,
    positions: Int[Array, "R T"],
    attention: Callable[[LayerKind, Array, Array, Array, Cache], tuple[Array, Cache]],
) -> MixOfKind:
    """For every kind of layer, attention over tokens behind its rotary positions, whose tables are made once."""
    tables = {
        rope: rope_table(positions, rope, config.attention.head_dim)
        for rope in {kind.rope or config.positions for kind in config.kinds}
        if not isinstance(rope, Learned)
    }

    def of_kind(kind: LayerKind) -> Mix:
        rope = kind.rope or config.positions
        table = tables.get(rope)  # type: ignore[arg-type]

        def mix(q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            if isinstance(rope, Rope) and table is not None:
                q, k = (rotate(x, *table, rope.interleaved) for x in (q, k))
            if kind.scale is not None:
                q = q * (kind.scale * config.attention.head_dim**0.5)
            return attention(kind, q, k, v, cache)

        return mix

    return of_kind


def scan_layers(
    config: DecoderConfig,
    stacked: Weights,
    x: Float[Array, "R T D"],
    mix_of: MixOfKind,
    *,
    remat: str = "none",
    constrain: Constrain = lambda x, axes: x,
) -> Float[Array, "R T D"]:
    """The residual stream behind all layers, in a scan, so that a compiler reads one layer.

    Kinds of layers alternate inside of the scan by a switch around attention alone.
    """
    mixes = [mix_of(kind) for kind in config.kinds]

    def layer(x: Array, scanned: tuple[Weights, Array]) -> tuple[Array, None]:
        weights, kind = scanned

        def mix(q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            if len(mixes) == 1:
                return mixes[0](q, k, v, cache)
            branches = [functools.partial(lambda m, q, k, v: m(q, k, v, None)[0], m) for m in mixes]
            return jax.lax.switch(kind, branches, q, k, v), None

        x, _ = block(config, weights, x, mix)
        return constrain(x, ("batch", "length", None)), None

    if REMAT[remat] is not None:
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    kinds = jnp.asarray(config.kind_of_layer or [0] * config.layers, jnp.int32)
    return jax.lax.scan(layer, x, (stacked, kinds))[0]


def unrolled_layers(
    config: DecoderConfig,
    layers: Sequence[Weights],
    x: Float[Array, "R T D"],
    mix_of: MixOfKind,
    caches: Sequence[Cache] | None = None,
) -> tuple[Float[Array, "R T D"], list[Cache]]:
    """The residual stream behind all layers, one after another, and their KV caches: for sampling."""
    kept: list[Cache] = []
    for i, (weights, cache) in enumerate(zip(layers, caches or [None] * len(layers), strict=True)):
        x, cache = block(config, weights, x, mix_of(config.kind(i)), cache)
        kept.append(cache)
    return x, kept


def final_norm(config: DecoderConfig, params: PyTree, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
    """The hidden states that the unembedding reads."""
    return normalize(config.norm, params, "final_norm", x)


def unembedding_of(config: DecoderConfig, params: PyTree) -> Head:
    """What maps hidden states to logits, or in a reward model to scores."""
    matrix, bias = params[config.unembedding], params.get("head_bias")
    cap = None if config.reward else config.logits_softcap
    return matrix if bias is None and cap is None else Unembedding(matrix, bias, cap)


def make_apply(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: str = "none",
    constrain: Constrain = lambda x, axes: x,
    attention: MakeAttention = shared_prompt_attention,
    normed: bool = True,
) -> ApplyFn:
    """``apply(params, inputs) -> (hidden [R, T, D], unembedding [V, D])``, the floors above need no more of a model.

    Args:
      config: the decoder's choices.
      dtype: compute dtype; parameters stay as they are.
      remat: key of :data:`REMAT`.
      constrain: pins activations to their place on a mesh.
      attention: which attention kernel (:func:`~dpojax.models.attention.make_attention`).
      normed: False returns activations before the final norm (bottom layers only).

    With an adapter (``config.lora``) the parameters are the base's and its own, and all of them are read.
    Inputs that carry ``hidden`` start from these activations instead of embeddings (top layers only).
    """
    whole, config = config, config.merged

    def apply(params: Mapping[str, Any], inputs: ModelInput) -> tuple[Float[Array, "R T D"], Head]:
        params = switched_on(whole, params)
        cap = config.attention.softcap
        attend = {window: attention(inputs, window, cap) for window in {kind.window for kind in config.kinds}}
        mix_of = rotary_mix(
            config, inputs.positions, lambda kind, q, k, v, cache: (attend[kind.window](q, k, v), cache)
        )
        x = embed(config, params, inputs.tokens, inputs.positions) if inputs.hidden is None else inputs.hidden
        x = constrain(x.astype(jnp.dtype(dtype)), ("batch", "length", None))
        x = scan_layers(config, params["blocks"], x, mix_of, remat=remat, constrain=constrain)
        return final_norm(config, params, x) if normed else x, unembedding_of(config, params)

    return apply
