"""One decoder for every family: RMSNorm, rotary grouped-query attention, SwiGLU, a scan over the layers.

Weights lie as Hugging Face stores them, output axes first, so that loading never transposes. The module is split at
the boundary into a static graph and a plain dict of arrays (`abstract_params`, `make_apply`); nothing else in the
project sees a module.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.attention import attend, rope_table, rotate, segment_mask
from dpojax.models.config import DecoderConfig
from dpojax.types import ApplyFn, PyTree

Cache = tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

# Logical axes of every parameter; `sharding.py` says which mesh axis, if any, each is split over.
PARAM_AXES: dict[str, PyTree] = {
    "embed": ("vocab", "embed"),
    "blocks": {
        "attn_norm": ("layers", "norm"),
        "q": ("layers", "heads", "head_dim", "embed"),
        "k": ("layers", "kv_heads", "head_dim", "embed"),
        "v": ("layers", "kv_heads", "head_dim", "embed"),
        "o": ("layers", "embed", "heads", "head_dim"),
        "mlp_norm": ("layers", "norm"),
        "gate": ("layers", "mlp", "embed"),
        "up": ("layers", "mlp", "embed"),
        "down": ("layers", "embed", "mlp"),
    },
    "final_norm": ("norm",),
    "head": ("vocab", "embed"),
}

REMAT = {
    "none": None,  # keep every activation: fastest, most memory
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products with weights only
    "block": jax.checkpoint_policies.nothing_saveable,  # keep one activation a layer: slowest, least memory
}
"""What the backward pass recomputes, by name."""


def rms_norm(x: Float[Array, "*_ D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*_ D"]:
    """``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich 2019, arXiv 1910.07467), the mean in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class Blocks(nnx.Module):
    """All layers, their weights stacked along a leading axis L; called inside a scan, where L is gone."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        L, D, F, h = config.layers, config.width, config.mlp_width, config.head_dim
        H, K = config.heads, config.kv_heads

        def weights(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (L, *shape)))

        self.attn_norm, self.mlp_norm = nnx.Param(jnp.ones((L, D))), nnx.Param(jnp.ones((L, D)))
        self.q, self.k, self.v, self.o = weights(H, h, D), weights(K, h, D), weights(K, h, D), weights(D, H, h)
        self.gate, self.up, self.down = weights(F, D), weights(F, D), weights(D, F)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        mask_BTS: Bool[Array, "B T S"],
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """One layer. With a cache, new keys and values are written into it at ``start``; all of it is attended to."""
        dtype, eps = x_BTD.dtype, self.config.norm_eps
        w = {name: getattr(self, name)[...].astype(dtype) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        y = rms_norm(x_BTD, self.attn_norm[...], eps)
        q = rotate(jnp.einsum("btd,nhd->btnh", y, w["q"]), *rope)
        k = rotate(jnp.einsum("btd,khd->btkh", y, w["k"]), *rope)
        v = jnp.einsum("btd,khd->btkh", y, w["v"])
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), start, axis=1)
        x_BTD = x_BTD + jnp.einsum("btnh,dnh->btd", attend(q, k, v, mask_BTS), w["o"])
        y = rms_norm(x_BTD, self.mlp_norm[...], eps)
        gated = jax.nn.silu(jnp.einsum("btd,fd->btf", y, w["gate"])) * jnp.einsum("btd,fd->btf", y, w["up"])
        return x_BTD + jnp.einsum("btf,df->btd", gated, w["down"]), (k, v)


class Decoder(nnx.Module):
    """Tokens to final hidden states; the vocabulary projection is left to the caller, who knows where it is needed."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.width
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (V, D)))
        self.blocks = Blocks(config, rngs)
        self.final_norm = nnx.Param(jnp.ones((D,)))
        if not config.tied:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), (V, D)))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask_BTS: Bool[Array, "B T S"],
        *,
        dtype: jnp.dtype,
        remat: str = "none",
        constrain: Constrain = lambda x, axes: x,
        caches: PyTree = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], PyTree]:
        """Returns hidden states, the unembedding matrix and, where ``caches`` (stacked over layers) came in, them."""
        graph, weights = nnx.split(self.blocks)
        rope = rope_table(positions, self.config)

        def layer(x: Array, scanned: tuple[PyTree, PyTree]) -> tuple[Array, Cache | None]:
            weights, cache = scanned
            x, kv = nnx.merge(graph, weights)(x, rope, mask_BTS, cache, start)
            return constrain(x, ("batch", "length", None)), None if cache is None else kv

        x = self.embed[...][tokens].astype(dtype)
        x = constrain(x, ("batch", "length", None))
        if REMAT[remat] is not None:
            layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
        x, caches = jax.lax.scan(layer, x, (weights, caches))
        x = rms_norm(x, self.final_norm[...], self.config.norm_eps)
        return x, (self.embed if self.config.tied else self.head)[...], caches


def split(config: DecoderConfig) -> tuple[nnx.GraphDef, PyTree]:
    """The decoder's static graph and its parameters' shapes, as a plain dict; nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(params)


def init_params(config: DecoderConfig, seed: int) -> PyTree:
    """Fresh random parameters (normal, 0.02), float32, as a plain dict."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed))))


def param_axes(config: DecoderConfig) -> PyTree:
    """Logical axis names of every parameter, in the parameters' structure."""
    return {name: axes for name, axes in PARAM_AXES.items() if name != "head" or not config.tied}


def make_apply(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: str = "none",
    constrain: Constrain = lambda x, axes: x,
) -> ApplyFn:
    """The model as a function of parameters.

    Args:
      config: the decoder's shape.
      dtype: compute dtype; parameters keep their own and are cast where they are used.
      remat: what the backward pass recomputes, a key of :data:`REMAT`.
      constrain: places an activation by its logical axes (:func:`dpojax.sharding.constrainer`).
    """
    graph, _ = split(config)

    def apply(
        params: PyTree, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        model = nnx.merge(graph, params)
        mask = segment_mask(segments)
        h, head, _ = model(tokens, positions, mask, dtype=jnp.dtype(dtype), remat=remat, constrain=constrain)
        return h, head

    return apply
