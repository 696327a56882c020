"""Rotary embedding, and attention under the mask of shared prompts.

Optimization barriers are for XLA's CPU compiler; ``scripts/profile_step.py`` measures what they save.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpojax.errors import UserError
from dpojax.models.config import Rope
from dpojax.packing import ModelInput, gather
from dpojax.sharding import RULES

Attend = Callable[[Array, Array, Array, Array, float | None], Array]
Attention = Callable[[Array, Array, Array], Array]
"""Queries ``[R, T, H, h]``, keys and values ``[R, T, K, h]`` of packed sequences -> ``[R, T, H, h]``."""
OnPadded = Callable[[Array, Array, Array, Array], Array]
"""The same on padded rows, ``[B, S, H, h]`` and ``[B, S, K, h]``, with the lengths of prompts behind."""
MakeAttention = Callable[[ModelInput, int | None, float | None], Attention]
"""A batch, how many of the latest tokens a token sees (None: all), the cap of scores (None: none) -> attention."""
CUDNN_HEAD = 128
"""The widest head that cuDNN has on every GPU; Hopper's may be of 256, which is not relied on."""


def rope_table(
    positions: Int[Array, "B T"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "B T f"], Float[Array, "B T f"]]:
    """Cosine and sine of position x frequency (Su et al. 2021, arXiv 2104.09864), float32."""
    rotated = int(head_dim * rope.share)
    exponents = jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated
    freqs = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling is not None and scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None and scaling.kind == "longrope":
        freqs = 1.0 / (jnp.asarray(scaling.short, jnp.float32) * rope.theta**exponents)
    elif scaling is not None:
        # Llama 3: long wavelengths are stretched by `factor`, short ones left alone, those between blended.
        turns = scaling.original_max_positions * freqs / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        freqs = freqs * (keep + (1 - keep) / scaling.factor)
    angles = positions[:, :, None].astype(jnp.float32) * freqs[None, None, :]
    factor = 1.0 if scaling is None else scaling.attention_factor
    return (jnp.cos(angles), jnp.sin(angles)) if factor == 1 else (factor * jnp.cos(angles), factor * jnp.sin(angles))


def rotate(
    x_BTNh: Float[Array, "B T N h"], cos: Float[Array, "B T f"], sin: Float[Array, "B T f"], interleaved: bool = False
) -> Float[Array, "B T N h"]:
    """Rotary embedding: the first and the second half of a head are the two coordinates, as in most of Hugging Face's
    models; or neighbours are (``interleaved``), as in GPT-J.

    Where the tables are of a part of the head's width, the rest is left as it is.
    """
    width = 2 * cos.shape[-1]
    x, rest = x_BTNh[..., :width].astype(jnp.float32), x_BTNh[..., width:]
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    pair = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    turned = turned.astype(x_BTNh.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BXHh: Float[Array, "B X H h"],
    k_BYKh: Float[Array, "B Y K h"],
    v_BYKh: Float[Array, "B Y K h"],
    mask_BXY: Bool[Array, "B X Y"],
    softcap: float | None = None,
) -> Float[Array, "B X H h"]:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), softmax in float32.

    A fully masked query returns the mean of the values; callers discard it. The backward pass is written by hand, with
    p the softmax and o the output: ``ds = p * (do @ v - sum(do * o)) / sqrt(h)``, times ``1 - (s / c)^2`` where the
    scores s are capped at c, ``s = c tanh(q k / (c sqrt(h)))``.
    """
    return _attend_forward(q_BXHh, k_BYKh, v_BYKh, mask_BXY, softcap)[0]


def _heads_first(x: Float[Array, "B X H h"], groups: int) -> Float[Array, "B K n h"]:
    """One matrix for each key/value head: rows are the query heads that share it, times the tokens."""
    B, X, H, h = x.shape
    return x.reshape(B, X, H // groups, groups, h).transpose(0, 2, 3, 1, 4).reshape(B, H // groups, groups * X, h)


def _tokens_first(x: Float[Array, "B K n h"], groups: int) -> Float[Array, "B X H h"]:
    B, K, n, h = x.shape
    return x.reshape(B, K, groups, n // groups, h).transpose(0, 3, 1, 2, 4).reshape(B, n // groups, K * groups, h)


def _attend_forward(
    q: Array, k: Array, v: Array, mask: Array, softcap: float | None
) -> tuple[Array, tuple[Array | None, ...]]:
    groups = q.shape[2] // k.shape[2]
    # Without the barriers, XLA's CPU compiler computes these transpositions inside of each reader, element by element.
    q, k, v = jax.lax.optimization_barrier((_heads_first(q, groups), _heads_first(k, 1), _heads_first(v, 1)))
    B, K, n, h = q.shape
    scores = jnp.einsum("bknh,bkyh->bkny", q, k, preferred_element_type=jnp.float32) * h**-0.5
    slope = None
    if softcap is not None:
        turned = jnp.tanh(scores / softcap)
        scores, slope = softcap * turned, 1 - jnp.square(turned)
    scores = scores.reshape(B, K, groups, n // groups, -1)
    scores = jnp.where(mask[:, None, None], scores, -1e30)  # finite: a row that may see nothing stays a number
    p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    p = (p / jnp.sum(p, axis=-1, keepdims=True)).reshape(B, K, n, -1).astype(v.dtype)
    o = checkpoint_name(jnp.einsum("bkny,bkyh->bknh", p, v), "attention")
    return _tokens_first(o, groups), (q, k, v, p, o, slope)


def _attend_backward(
    softcap: float | None, kept: tuple, do: Float[Array, "B X H h"]
) -> tuple[Array, Array, Array, None]:
    q, k, v, p, o, slope = kept
    groups = do.shape[2] // k.shape[1]
    do, turned = jax.lax.optimization_barrier((_heads_first(do, groups), jnp.swapaxes(p, 2, 3)))
    dv = jnp.einsum("bkyn,bknh->bkyh", turned, do)
    dp = jnp.einsum("bknh,bkyh->bkny", do, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    ds = p * (dp - mean) * q.shape[-1] ** -0.5
    ds = (ds if slope is None else ds * slope).astype(q.dtype)
    ds, turned = jax.lax.optimization_barrier((ds, jnp.swapaxes(ds, 2, 3)))
    dq, dk = jnp.einsum("bkny,bkyh->bknh", ds, k), jnp.einsum("bkyn,bknh->bkyh", turned, q)
    return _tokens_first(dq, groups), _tokens_first(dk, 1), _tokens_first(dv, 1), None


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def move(x: Float[Array, "R n *d"], source: Int[Array, "R m"], target: Int[Array, "R n"]) -> Float[Array, "R m *d"]:
    """``x[r, source[r, i]]``, zero beyond the end; ``target`` is the inverse of ``source``, by which gradients go back.

    (Left to itself, JAX would scatter them.)
    """
    return gather(x, source)


def _move_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return move(x, source, target), (source, target)


def _move_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    source, target = kept
    return move(g, target, source), None, None


move.defvjp(_move_forward, _move_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat(x: Float[Array, "B *d"], N: int) -> Float[Array, "BN *d"]:
    """Every row N times. Gradients are added up one by one, which XLA's CPU compiler makes faster than a reduction."""
    return jnp.repeat(x, N, axis=0)


def _repeat_backward(N: int, kept: None, g: Array) -> tuple[Array]:
    g = g.reshape(-1, N, *g.shape[1:])
    return (functools.reduce(jnp.add, [g[:, n] for n in range(N)]),)


repeat.defvjp(lambda x, N: (jnp.repeat(x, N, axis=0), None), _repeat_backward)


def causal(n: int, window: int | None = None) -> Bool[Array, "1 n n"]:
    """True where a token sees a token: itself and earlier ones, of these the latest ``window`` (None: all)."""
    mask = jnp.tril(jnp.ones((1, n, n), bool))
    return mask if window is None else mask & ~jnp.tril(mask, -window)


def shared_prompt_attention(
    inputs: ModelInput,
    window: int | None = None,
    softcap: float | None = None,
    attend: Attend = attend,
    mesh: Mesh | None = None,
) -> Attention:
    """Attention where completions see their prompt and themselves, in blocks: no score between two completions of a
    prompt, nor of a prompt with its completions, is ever computed.

    Args:
      inputs: what the model reads; says which padded columns are prompt and which completion.
      window: how many of the latest tokens a token sees, itself included (None: all).
      softcap: the cap of scores (None: none).
      attend: attention of one block, as :func:`attend` and :func:`cudnn_attend`.
      mesh: the devices that split sequences and heads (default: one).
    """
    P, C = inputs.prompt, inputs.completion

    def on_padded(q: Array, k: Array, v: Array, prompt_len: Array) -> Array:
        B, N = q.shape[0], (q.shape[1] - P) // C if C else 0
        q, k, v = checkpoint_name((q, k, v), "qkv")
        valid = jnp.arange(P)[None, :] >= P - prompt_len[:, None]
        prompts = attend(q[:, :P], k[:, :P], v[:, :P], causal(P, window) & valid[:, None, :], softcap)
        if N == 0:
            return prompts
        own = lambda x: x[:, P:].reshape(B * N, C, *x.shape[2:])  # noqa: E731
        behind = lambda x: jnp.concatenate([repeat(x[:, :P], N), own(x)], axis=1)  # noqa: E731
        # A prompt ends, and its completions begin, at the same column, so distances are those of the columns.
        near = jnp.ones((1, C, P), bool) if window is None else causal(P + C, window)[:, P:, :P]
        mask = jnp.repeat(near & valid[:, None, :], N, axis=0)
        mask = jnp.concatenate([mask, jnp.broadcast_to(causal(C, window), (B * N, C, C))], axis=2)
        completions = attend(own(q), behind(k), behind(v), mask, softcap)
        return jnp.concatenate([prompts, completions.reshape(B, N * C, *q.shape[2:])], axis=1)

    return from_padded(on_padded, inputs, mesh)


def cudnn_attend(q: Array, k: Array, v: Array, mask: Array, softcap: float | None = None) -> Array:
    """:func:`attend` by cuDNN's flash attention: an NVIDIA GPU, and float16 or bfloat16; by :func:`attend` itself where
    cuDNN has no kernel: capped scores, and heads of more than 128 numbers or of no multiple of 8."""
    head_dim = q.shape[-1]
    if softcap is not None or head_dim > CUDNN_HEAD or head_dim % 8:
        return attend(q, k, v, mask, softcap)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")


def splash_shared_prompt_attention(
    inputs: ModelInput, window: int | None, softcap: float | None, mesh: Mesh | None
) -> Attention:
    """:func:`shared_prompt_attention` by JAX's Splash kernel: a TPU."""
    from dpojax.models.splash import splash_attention  # a TPU's compiler, which others need not load

    form: dict[str, Any] = {"prompt": inputs.prompt, "completion": inputs.completion}
    return from_padded(functools.partial(splash_attention, window=window, softcap=softcap, **form), inputs, mesh)


def make_attention(name: str, mesh: Mesh | None = None, dtype: str = "float32") -> MakeAttention:
    """Attention of a batch, a window and a cap of scores, by the name of its kernel, as ``--attention`` has it.

    Args:
      name: "xla" (any device), "cudnn" (an NVIDIA GPU, bfloat16), "splash" (a TPU), or "auto": the kernel that is
        made for the mesh's devices and for ``dtype``.
      mesh: the devices that compute (default: one, of JAX's default kind).
      dtype: of queries, keys and values.

    Raises:
      UserError: the kernel is not made for these devices or for this dtype.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    fitting = {"tpu": "splash", "gpu": "cudnn" if dtype == "bfloat16" else "xla"}.get(platform, "xla")
    name = fitting if name == "auto" else name
    wanted = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if wanted != platform:
        raise UserError(f"--attention {name}: is for a {wanted.upper()}, this is a {platform.upper()}; use auto")
    if name == "cudnn" and dtype != "bfloat16":
        raise UserError(f"--attention cudnn: does not compute in {dtype}; add --dtype bfloat16, or use xla")
    if name == "splash":
        return lambda inputs, window, softcap: splash_shared_prompt_attention(inputs, window, softcap, mesh)
    kernel = cudnn_attend if name == "cudnn" else attend
    return lambda inputs, window, softcap: shared_prompt_attention(inputs, window, softcap, kernel, mesh)


def from_padded(on_padded: OnPadded, inputs: ModelInput, mesh: Mesh | None = None) -> Attention:
    """Attention on packed sequences, from attention on the padded layout ``[B, S]``.

    Every device moves its own sequences to the padded layout, with its own heads, and back; left to the compiler, the
    joint move of queries, keys and values would travel between devices that split the heads. Sequences that are padded
    rows already are not moved.
    """

    def on_device(q: Array, k: Array, v: Array, packed: Array, padded: Array, prompt_len: Array) -> Array:
        if not inputs.packed:
            return on_padded(q, k, v, prompt_len)
        (R, _, H, _), K, B = q.shape, k.shape[2], prompt_len.shape[0]
        joint = jnp.concatenate([q, k, v], axis=2)  # one gather instead of three
        joint = move(joint, packed, padded)
        joint = joint.reshape(B, -1, *joint.shape[2:])
        out = on_padded(joint[:, :, :H], joint[:, :, H : H + K], joint[:, :, H + K :], prompt_len)
        return move(out.reshape(R, -1, *out.shape[2:]), padded, packed)

    indices = inputs.packed_index, inputs.padded_index, inputs.prompt_len
    if mesh is None or mesh.size == 1:
        return lambda q, k, v: on_device(q, k, v, *indices)
    by_row, by_head = PartitionSpec(RULES.batch), RULES.spec(("batch", None, "heads", None))
    specs = (by_head, by_head, by_head, by_row, by_row, by_row)
    # Pallas does not say over which axes its outputs vary, so there is nothing for check_vma to check.
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    return lambda q, k, v: split(q, k, v, *indices)
