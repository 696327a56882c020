"""Who attends to whom, and the attention itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.config import DecoderConfig


def segment_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """``mask[b, q, k]``: token q sees token k, if k comes no later and is of the prompt (0) or of q's own segment.

    Padding (-1) is seen by nobody but itself: a row of the softmax is never empty.
    """
    T = segments.shape[1]
    q, k = segments[:, :, None], segments[:, None, :]
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    return (causal & (k >= 0) & ((k == 0) | (k == q))) | jnp.eye(T, dtype=bool)[None]


def rope_table(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> tuple[Float[Array, "B T f"], Float[Array, "B T f"]]:
    """Cosine and sine of position x frequency (Su et al. 2021, arXiv 2104.09864), float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None:
        # Llama 3: long wavelengths are stretched by `factor`, short ones left alone, those between blended.
        turns = scaling.original_max_positions * freqs / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        freqs = freqs * (keep + (1 - keep) / scaling.factor)
    angles = positions[:, :, None].astype(jnp.float32) * freqs[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNh: Float[Array, "B T N h"], cos: Float[Array, "B T f"], sin: Float[Array, "B T f"]
) -> Float[Array, "B T N h"]:
    """Rotary embedding in Hugging Face's layout: the first and the second half of a head are the two coordinates."""
    first, second = jnp.split(x_BTNh.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNh.dtype)


def attend(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """Grouped-query attention, softmax in float32."""
    return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, mask=mask_BTS[:, None], implementation="xla")
