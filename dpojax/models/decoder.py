"""One decoder for every family: embed, scan over the layers, final norm; pure functions of parameters and tokens."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpojax.models.attention import MakeAttention, rope_table, rotate, shared_prompt_attention
from dpojax.models.block import RESIDUAL, WHOLE, Cache, Feed, Mix, Weights, block, mlp, normalize
from dpojax.models.config import DecoderConfig, LayerKind, Learned, Rope
from dpojax.models.experts import Routing, mixture, mixture_over_mesh, routing
from dpojax.models.lora import switched_on
from dpojax.models.params import layers_with
from dpojax.packing import ApplyFn, ModelInput
from dpojax.sharding import Constrain
from dpojax.types import Head, PyTree, Unembedding

MixOfKind = Callable[[LayerKind], Mix]

named, policies = jax.checkpoint_policies.save_only_these_names, jax.checkpoint_policies
REMAT = {
    "none": None,
    "mlp": named("attention", "qkv", "o", "mlp"),
    "dots": policies.dots_with_no_batch_dims_saveable,
    "qkv": named("attention", "qkv"),
    "attention": named("attention"),
    "block": policies.nothing_saveable,
}
"""What the backward pass keeps of every layer, by name; it computes all else again. From the most memory and the least
recomputation on, and how many numbers a token has there, with D, F the widths of model and MLP, H and K heads of h:

- ``none``: everything.
- ``mlp``: products with weights, and attention's inputs and results, ``D + (2 H + 2 K) h + D + 2 F``.
- ``dots``: products with weights, so that attention is computed again, ``D + (H + 2 K) h + D + 2 F``.
- ``qkv``: attention's inputs and results, ``D + (2 H + 2 K) h``.
- ``attention``: attention's results, ``D + H h``.
- ``block``: the residual stream, ``D``.

Attention's inputs and results are those of the padded layout, except for ``dots``.
"""


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
            return attention(kind, q, k, v, cache)

        return mix

    return of_kind


def runs(config: DecoderConfig, layers: int) -> list[range]:
    """Layers, one behind the other, whose tensors are of the same shapes: with an MLP, or with a mixture of experts."""
    out = [range(0)]
    for i in range(layers):
        same = not out[-1] or (i in config.dense_layers) == (i - 1 in config.dense_layers)
        out = [*out[:-1], range(out[-1].start, i + 1)] if same else [*out, range(i, i + 1)]
    return out


def weights_of(config: DecoderConfig, stacked: Weights, run: range) -> Weights:
    """The tensors of a run of layers, of the layers' stacked ones."""
    if config.experts is None or not config.dense_layers:
        return stacked
    out = {}
    for name, x in stacked.items():
        layers = layers_with(config, name)
        if run.start in layers:
            first = layers.index(run.start)
            out[name] = x[first : first + len(run)]
    return out


def weights_of_layer(config: DecoderConfig, stacked: Weights, layer: int) -> Weights:
    """One layer's tensors, of the layers' stacked ones."""
    having = {name: layers_with(config, name) for name in stacked}
    return {name: x[having[name].index(layer)] for name, x in stacked.items() if layer in having[name]}


def scan_layers(
    config: DecoderConfig,
    stacked: Weights,
    x: Float[Array, "R T D"],
    mix_of: MixOfKind,
    *,
    remat: str = "none",
    constrain: Constrain = lambda x, axes: x,
    within: Constrain | None = None,
    feed: Feed | None = None,
    kept: Callable[[], Any] = lambda: None,
) -> tuple[Float[Array, "R T D"], list[Any]]:
    """The residual stream behind all layers, in a scan, so that a compiler reads one layer.

    Kinds of layers alternate inside of the scan by a switch around attention alone; scales of scores are scanned.
    Layers of other tensors (:func:`runs`) are a scan of their own.

    Args:
      config: the decoder's choices.
      stacked: the layers' tensors.
      x: the residual stream before the first layer.
      mix_of: attention of a kind of layers.
      remat: key of :data:`REMAT`.
      constrain: pins activations to their place on a mesh.
      within: the same within a layer (:func:`~dpojax.models.block.block`).
      feed: the feed-forward half of layers with a mixture of experts (default: :func:`~dpojax.models.experts.mixture`).
      kept: called after each layer, for what else its ``feed`` has left behind.

    Returns:
      The residual stream, and of each scan what ``kept`` has returned of its layers, stacked.
    """
    layers = stacked["o"].shape[0]
    if layers == 0:  # of a model whose layers are all trained, the frozen ones
        return x, []
    kinds = [config.kind(i) for i in range(layers)]
    distinct = list(dict.fromkeys(dataclasses.replace(kind, scale=None) for kind in kinds))
    mixes = [mix_of(kind) for kind in distinct]
    which = np.array([distinct.index(dataclasses.replace(kind, scale=None)) for kind in kinds], np.int32)
    scaled = any(kind.scale is not None for kind in kinds)
    scales = np.array([relative_scale(config, kind) for kind in kinds], np.float32)

    def layer(x: Array, scanned: tuple[Weights, Array, Array]) -> tuple[Array, Any]:
        weights, kind, scale = scanned

        def mix(q: Array, k: Array, v: Array, cache: Cache) -> tuple[Array, Cache]:
            q = q * scale.astype(q.dtype) if scaled else q
            if len(mixes) == 1:
                return mixes[0](q, k, v, cache)
            branches = [functools.partial(lambda m, q, k, v: m(q, k, v, None)[0], m) for m in mixes]
            return jax.lax.switch(kind, branches, q, k, v), None

        x, _ = block(config, weights, x, mix, feed=feed_of(weights, feed), constrain=within)
        return constrain(x, WHOLE if within is None else RESIDUAL), kept()

    if REMAT[remat] is not None:
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    out = []
    for run in runs(config, layers):
        part = slice(run.start, run.stop)
        x, more = jax.lax.scan(
            layer, x, (weights_of(config, stacked, run), jnp.asarray(which[part]), jnp.asarray(scales[part]))
        )
        out.append(more)
    return x, out


def feed_of(weights: Weights, feed: Feed | None = None) -> Feed:
    """The feed-forward half of a layer with these tensors; ``feed`` where it has a mixture of experts."""
    return (feed or mixture) if "router" in weights else mlp


def relative_scale(config: DecoderConfig, kind: LayerKind) -> float:
    """What queries are multiplied with, where a kind of layers has another scale of scores than attention's."""
    base = config.attention.scale or config.attention.head_dim**-0.5
    return 1.0 if kind.scale is None else kind.scale / base


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
        x, cache = block(config, weights, x, scaled_mix(config, config.kind(i), mix_of), cache, feed_of(weights))
        kept.append(cache)
    return x, kept


def scaled_mix(config: DecoderConfig, kind: LayerKind, mix_of: MixOfKind) -> Mix:
    """The mix of a kind of layers, whose queries are multiplied so that scores have its scale."""
    mix, scale = mix_of(kind), relative_scale(config, kind)
    return mix if scale == 1 else lambda q, k, v, cache: mix(q * jnp.asarray(scale, q.dtype), k, v, cache)


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
    mesh: Mesh | None = None,
    routings: list[Routing] | None = None,
) -> ApplyFn:
    """``apply(params, inputs) -> (hidden [R, T, D], unembedding [V, D])``, the floors above need no more of a model.

    Args:
      config: the decoder's choices.
      dtype: compute dtype; parameters stay as they are.
      remat: key of :data:`REMAT`.
      constrain: pins activations to their place on a mesh.
      attention: which attention kernel (:func:`~dpojax.models.attention.make_attention`).
      normed: False returns activations before the final norm (bottom layers only).
      mesh: the devices over which a mixture's experts are shared out (default: left to the compiler).
      routings: a list to which every call of a mixture of experts adds what its routers did
        (:func:`~dpojax.models.experts.balance_loss`), as values of the computation that the call is traced in.

    With an adapter (``config.lora``) the parameters are the base's and its own, and all of them are read.
    Inputs that carry ``hidden`` start from these activations instead of embeddings (top layers only).
    """
    whole, config = config, config.merged

    def apply(params: Mapping[str, Any], inputs: ModelInput) -> tuple[Float[Array, "R T D"], Head]:
        params = switched_on(whole, params)
        cap = config.attention.softcap
        windows = {kind.window for kind in config.kinds}
        attend = {window: attention(inputs, window, cap) for window in windows}
        mix_of = rotary_mix(
            config, inputs.positions, lambda kind, q, k, v, cache: (attend[kind.window](q, k, v), cache)
        )
        x = embed(config, params, inputs.tokens, inputs.positions) if inputs.hidden is None else inputs.hidden
        x = constrain(x.astype(jnp.dtype(dtype)), WHOLE)
        real, left = inputs.padded_index < inputs.packed_index.shape[1], []

        def feed(config: DecoderConfig, weights: Weights, x: Array) -> Array:
            if routings is not None:
                left.append(routing(config, weights, x, real))
            return mixture_over_mesh(config, weights, x, mesh)

        x, kept = scan_layers(
            config,
            params["blocks"],
            x,
            mix_of,
            remat=remat,
            constrain=constrain,
            within=constrain if mesh is not None and mesh.shape["tensor"] > 1 else None,
            feed=feed,
            kept=lambda: left.pop() if left else None,
        )
        if routings is not None and config.experts is not None:
            some = [part for part in kept if part is not None]
            routings.append(jax.tree.map(lambda *x: jnp.concatenate(x), *some))
        return final_norm(config, params, x) if normed else x, unembedding_of(config, params)

    return apply
