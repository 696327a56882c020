"""One decoder for every family: RMSNorm, rotary grouped-query attention, SwiGLU.

Weights lie with the model's width first, the narrow axis: a product's gradient then transposes the narrower of its two
activations. The module is split at the boundary into a static graph and a plain dict of arrays (`split`, `make_apply`);
nothing else in the project sees a module.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpojax.models.attention import Attention, rope_table, rotate, shared_prompt_attention
from dpojax.models.config import DecoderConfig
from dpojax.packing import ModelInput
from dpojax.types import ApplyFn, PyTree

Cache = tuple[Array, Array] | None
CachedAttention = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]
"""Queries, keys, values and what the layer has of earlier tokens -> outputs and what it has of all."""
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

# Logical axes of every parameter; `sharding.py` says which mesh axis, if any, each is split over.
PARAM_AXES: dict[str, PyTree] = {
    "embed": ("vocab", "embed"),
    "blocks": {
        "attn_norm": ("layers", "norm"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "k": ("layers", "embed", "kv_heads", "head_dim"),
        "v": ("layers", "embed", "kv_heads", "head_dim"),
        "o": ("layers", "embed", "heads", "head_dim"),
        "mlp_norm": ("layers", "norm"),
        "gate": ("layers", "embed", "mlp"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "embed", "mlp"),
    },
    "final_norm": ("norm",),
    "head": ("vocab", "embed"),
    "score": (None, "embed"),
}

REMAT = {
    "none": None,  # keep every activation: fastest, most memory
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products with weights only
    "block": jax.checkpoint_policies.nothing_saveable,  # keep one activation a layer: slowest, least memory
}
"""What the backward pass recomputes, by name."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "R T D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "R T D"]:
    """``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich 2019, arXiv 1910.07467), the mean in float32.

    The backward pass is made by hand, with n the normalised x and r the root's reciprocal:
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
    product = jax.lax.optimization_barrier(dy * n)
    scale32 = scale.astype(jnp.float32)
    dscale = jnp.einsum("rt,rtd->d", jnp.ones(x.shape[:2]), product)
    mean = jnp.einsum("rtd,d->rt", product, scale32 / x.shape[-1])[..., None]
    dx = r * (dy * scale32[None, None] - n * mean)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def gated_mlp(
    y_RTD: Float[Array, "R T D"],
    gate_DF: Float[Array, "D F"],
    up_DF: Float[Array, "D F"],
    down_DF: Float[Array, "D F"],
) -> Float[Array, "R T D"]:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): ``down (silu(gate y) * up y)``.

    The backward pass is made by hand: it keeps the two projections alone, and computes all that is elementwise in one
    go.
    """
    return _gated_mlp_forward(y_RTD, gate_DF, up_DF, down_DF)[0]


def _gated_mlp_forward(y: Array, gate: Array, up: Array, down: Array) -> tuple[Array, tuple]:
    a, b = jnp.einsum("rtd,df->rtf", y, gate), jnp.einsum("rtd,df->rtf", y, up)
    return jnp.einsum("rtf,df->rtd", jax.nn.silu(a) * b, down), (y, a, b, gate, up, down)


def _gated_mlp_backward(kept: tuple, do: Array) -> tuple[Array, Array, Array, Array]:
    y, a, b, gate, up, down = kept
    dh = jnp.einsum("rtd,df->rtf", do, down)
    # The first barrier keeps XLA from keeping the forward pass's sigmoid; the second keeps its CPU compiler from
    # computing these inside of the products' transpositions, element by element.
    a, b, dh = jax.lax.optimization_barrier((a, b, dh))
    share = jax.nn.sigmoid(a)
    silu = a * share
    h, da, db = jax.lax.optimization_barrier((silu * b, dh * b * (share + silu * (1 - share)), dh * silu))
    dy = jnp.einsum("rtf,df->rtd", da, gate) + jnp.einsum("rtf,df->rtd", db, up)
    dgate, dup = jnp.einsum("rtd,rtf->df", y, da), jnp.einsum("rtd,rtf->df", y, db)
    return dy, dgate, dup, jnp.einsum("rtd,rtf->df", do, h)


gated_mlp.defvjp(_gated_mlp_forward, _gated_mlp_backward)


class Blocks(nnx.Module):
    """All layers, their weights stacked along a leading axis L; called for one at a time, where L is gone."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        L, D, F, h = config.layers, config.width, config.mlp_width, config.head_dim
        H, K = config.heads, config.kv_heads

        def weights(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (L, *shape)))

        self.attn_norm, self.mlp_norm = nnx.Param(jnp.ones((L, D))), nnx.Param(jnp.ones((L, D)))
        self.q, self.k, self.v, self.o = weights(D, H, h), weights(D, K, h), weights(D, K, h), weights(D, H, h)
        self.gate, self.up, self.down = weights(D, F), weights(D, F), weights(D, F)

    def __call__(
        self, x_RTD: Float[Array, "R T D"], rope: tuple[Array, Array], attention: CachedAttention, cache: Cache = None
    ) -> tuple[Float[Array, "R T D"], Cache]:
        eps = self.config.norm_eps
        q, k, v = self.qkv(rms_norm(x_RTD, self.attn_norm[...], eps))
        out, cache = attention(rotate(q, *rope), rotate(k, *rope), v, cache)
        x_RTD = x_RTD + self.attn_out(out)
        return x_RTD + self.mlp(rms_norm(x_RTD, self.mlp_norm[...], eps)), cache

    def qkv(self, y: Float[Array, "R T D"]) -> tuple[Array, Array, Array]:
        """Queries ``[R, T, H, h]``, keys and values ``[R, T, K, h]``."""
        q, k, v = (jnp.einsum("rtd,dnh->rtnh", y, w[...].astype(y.dtype)) for w in (self.q, self.k, self.v))
        return q, k, v

    def attn_out(self, out: Float[Array, "R T H h"]) -> Float[Array, "R T D"]:
        return jnp.einsum("rtnh,dnh->rtd", out, self.o[...].astype(out.dtype))

    def mlp(self, y: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return gated_mlp(y, *(w[...].astype(y.dtype) for w in (self.gate, self.up, self.down)))


class Decoder(nnx.Module):
    """Tokens to final hidden states; the vocabulary projection is left to the caller, who knows where it is needed."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.width
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (V, D)))
        self.blocks = Blocks(config, rngs)
        self.final_norm = nnx.Param(jnp.ones((D,)))
        if config.reward:
            self.score = nnx.Param(jnp.zeros((1, D)))
        elif not config.tied:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), (V, D)))

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        attention: CachedAttention,
        *,
        dtype: jnp.dtype,
        remat: str = "none",
        constrain: Constrain = lambda x, axes: x,
        hidden: Float[Array, "R T D"] | None = None,
        normed: bool = True,
        layers: Sequence[Blocks] | None = None,
        caches: PyTree = None,
    ) -> tuple[Float[Array, "R T D"], Float[Array, "V D"], PyTree]:
        """Hidden states, the unembedding matrix and what every layer's attention had to keep.

        The layers run in a scan, so that a compiler reads one. A caller who runs them many times over, token by
        token, cuts them out of the stack once and gives them as ``layers``. Where the layers are the upper ones of a
        model, ``hidden`` is what the lower ones have made of the tokens; where they are its lower ones, what leaves
        them is not ``normed``.
        """
        graph, stacked = nnx.split(self.blocks)
        rope = rope_table(positions, self.config)

        def layer(x: Array, scanned: tuple[PyTree, Cache]) -> tuple[Array, Cache]:
            weights, cache = scanned
            x, cache = nnx.merge(graph, weights)(x, rope, attention, cache)
            return constrain(x, ("batch", "length", None)), cache

        if REMAT[remat] is not None:
            layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
        x = self.embed[...][tokens] if hidden is None else hidden
        x = constrain(x.astype(dtype), ("batch", "length", None))
        kept: PyTree = []
        if layers is None:
            x, kept = jax.lax.scan(layer, x, (stacked, caches))
        else:
            for block, cache in zip(layers, caches or [None] * len(layers), strict=True):
                x, cache = block(x, rope, attention, cache)
                kept.append(cache)
        if normed:
            x = rms_norm(x, self.final_norm[...], self.config.norm_eps)
        return x, getattr(self, unembedding(self.config))[...], kept


def unembedding(config: DecoderConfig) -> str:
    """Which parameter turns hidden states into logits or, in a reward model, into scores."""
    return "score" if config.reward else "embed" if config.tied else "head"


def split(config: DecoderConfig) -> tuple[nnx.GraphDef, PyTree]:
    """The decoder's static graph and its parameters' shapes, as a plain dict; nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(params)


def init_params(config: DecoderConfig, seed: int) -> PyTree:
    """Fresh random parameters (normal, 0.02), float32, as a plain dict."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed))))


def param_axes(config: DecoderConfig) -> PyTree:
    """Logical axis names of every parameter, in the parameters' structure."""
    absent = {"head", "score"} - {unembedding(config)}
    return {name: axes for name, axes in PARAM_AXES.items() if name not in absent}


def make_apply(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    remat: str = "none",
    constrain: Constrain = lambda x, axes: x,
    attention: Callable[[ModelInput], Attention] = shared_prompt_attention,
    normed: bool = True,
) -> ApplyFn:
    """The model as a function of parameters; it starts from ``inputs.hidden``, where there is any.

    Args:
      config: the decoder's shape.
      dtype: compute dtype; parameters keep their own and are cast where they are used.
      remat: what the backward pass recomputes, a key of :data:`REMAT`.
      constrain: places an activation by its logical axes (:func:`dpojax.sharding.constrainer`).
      attention: the kernel (:func:`~dpojax.models.attention.make_attention`).
      normed: whether the final norm is applied; False is for a trunk, on whose hidden states others go on.
    """
    graph, _ = split(config)

    def apply(params: PyTree, inputs: ModelInput) -> tuple[Float[Array, "R T D"], Float[Array, "V D"]]:
        attend = attention(inputs)
        h, head, _ = nnx.merge(graph, params)(
            inputs.tokens,
            inputs.positions,
            lambda q, k, v, cache: (attend(q, k, v), None),
            dtype=jnp.dtype(dtype),
            remat=remat,
            constrain=constrain,
            hidden=inputs.hidden,
            normed=normed,
        )
        return h, head

    return apply
