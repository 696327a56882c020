"""KV caches for sampling: one a layer, as long as the text, or as the layer's window.

The prompts of a batch are padded on the left, so that all of them end, and all of their completions begin, at one
column; column c of every row lies in slot ``c % slots``. A layer with a window so has its latest columns alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.block import Cache
from dpojax.models.config import LayerKind


def slots_of(kind: LayerKind, columns: int) -> int:
    """How many columns, of this many, the KV cache of a kind of layer holds: all, or as many as the window."""
    return columns if kind.window is None else min(columns, kind.window)


def cache_of(k: Float[Array, "B P K h"], v: Float[Array, "B P K h"], slots: int) -> tuple[Array, Array]:
    """The KV cache of prompts, ``[B, K, h, slots]`` and ``[B, K, slots, h]``: their latest columns in their slots."""
    P = k.shape[1]
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    if slots >= P:
        none, more = (0, 0), (0, slots - P)
        return jnp.pad(keys, [none, none, none, more]), jnp.pad(values, [none, none, more, none])
    # Column P - slots + j lies in slot (P + j) % slots.
    return jnp.roll(keys[..., P - slots :], P % slots, axis=3), jnp.roll(values[:, :, P - slots :], P % slots, axis=2)


def put(
    cache: Cache, k: Float[Array, "B 1 K h"], v: Float[Array, "B 1 K h"], column: Int[Array, ""]
) -> tuple[Array, Array]:
    """The KV cache with a further column, in place of that which has left the window."""
    assert cache is not None
    slot = column % cache[1].shape[2]
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k.transpose(0, 2, 3, 1), slot, axis=3)
    return keys, jax.lax.dynamic_update_slice_in_dim(cache[1], v.swapaxes(1, 2), slot, axis=2)


def seen(slots: int, column: Int[Array, ""], starts: Int[Array, " B"]) -> Bool[Array, "B slots"]:
    """Which slots hold what the newest column sees: columns that are there, from their row's first on.

    Those of a window's cache are all inside of the window.
    """
    held = column - (column - jnp.arange(slots)) % slots  # the latest column of every slot; below 0 where there is none
    return held[None, :] >= starts[:, None]


def attend_one(
    q: Float[Array, "B 1 H h"],
    keys: Float[Array, "B K h S"],
    values: Float[Array, "B K S h"],
    sees: Bool[Array, "B S"],
    softcap: float | None = None,
) -> Float[Array, "B 1 H h"]:
    """The newest token's attention to the KV cache, softmax in float32."""
    B, _, H, h = q.shape
    grouped = q.reshape(B, keys.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    p = jax.nn.softmax(jnp.where(sees[:, None, None, :], scores, -1e30), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", p, values).reshape(B, 1, H, h)
