"""Attention over a prompt shared by several completions, as JAX's Splash (sparse flash) kernel for TPUs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

LANES = 128
MAX_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class SharedPromptMask(masks.Mask):
    """Query i sees key j, if j comes no later and is of the prompt or of i's own completion; and within a window, if j
    is one of the latest ``window`` tokens, i itself included.

    A row is ``prompt`` tokens and then completions of ``completion`` tokens each; ``length`` counts the row and
    what pads it, which reads as more completions. Computed slice by slice: the length x length array never exists,
    and Splash skips the blocks in which nobody sees anybody.
    """

    length: int
    prompt: int
    completion: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length, self.length

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        tokens = np.arange(self.length, dtype=np.int32)
        q, k = tokens[idx[0]][:, None], tokens[idx[1]][None, :]
        own_start = self.prompt + (q - self.prompt) // self.completion * self.completion
        sees = (k <= q) & ((k < self.prompt) | (k >= own_start))
        if self.window is None:
            return sees
        # Every completion follows the prompt: its first token is one behind the prompt's last.
        place = lambda at: np.where(at < self.prompt, at, self.prompt + (at - self.prompt) % self.completion)  # noqa: E731
        return sees & (place(q) - place(k) < self.window)


def block_of(length: int) -> int:
    """The kernel's block, in tokens: a multiple of 128 and at most 512.

    Large blocks keep the matrix unit busy, so the block is the smallest with as few blocks as 512 needs.
    """
    blocks = math.ceil(length / MAX_BLOCK)
    return math.ceil(length / blocks / LANES) * LANES


def splash_kernel(
    length: int,
    prompt: int,
    completion: int,
    heads: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> kernels.SplashAttentionKernel:
    """Splash attention for one row: ``(q [H,S,h], k [K,S,h], v [K,S,h], SegmentIds) -> [H,S,h]``, S a whole of blocks.

    Source: ``jax.experimental.pallas.ops.tpu.splash_attention``. It does not scale; its softmax is float32.
    Gradients of q and of (k, v) are two kernels: the fused one holds a gradient of q for every block of keys.
    """
    block = block_of(length)
    mask = SharedPromptMask(math.ceil(length / block) * block, prompt, completion, window)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _rows(
    q_BSHh: Float[Array, "B S H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    prompt_len_B: Int[Array, " B"],
    *,
    prompt: int,
    completion: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B S H h"]:
    """What one device computes: pad to whole blocks, run the kernel on every row, cut the padding off."""
    _, S, H, h = q_BSHh.shape
    kernel = splash_kernel(S, prompt, completion, H, window=window, softcap=softcap, interpret=interpret)
    padding = ((0, 0), (0, 0), (0, -S % block_of(S)), (0, 0))
    to_kernel = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), padding)  # noqa: E731
    scaled = (q_BSHh.astype(jnp.float32) / math.sqrt(h)).astype(q_BSHh.dtype)
    q_BHSh, k_BKSh, v_BKSh = checkpoint_name((to_kernel(scaled), to_kernel(k_BSKh), to_kernel(v_BSKh)), "qkv")
    # Left padding is a segment of its own: it sees itself, so no row of the softmax is empty.
    tokens = jnp.arange(q_BHSh.shape[2])
    segments_BS = (tokens[None, :] >= prompt - prompt_len_B[:, None]).astype(jnp.int32)
    out_BHSh = jax.vmap(kernel)(q_BHSh, k_BKSh, v_BKSh, kernels.SegmentIds(segments_BS, segments_BS))
    assert isinstance(out_BHSh, jax.Array)  # and not also its residuals
    return jnp.swapaxes(out_BHSh[:, :, :S], 1, 2)


def _check(q: Array, k: Array, prompt: int, completion: int, rows: int, heads: int) -> None:
    B, S, H, _ = q.shape
    K = k.shape[2]
    if completion < 1 or prompt > S or (S - prompt) % completion:
        raise ValueError(f"{S} tokens are not a prompt of {prompt} and whole completions of {completion}")
    if H % K:
        raise ValueError(f"{K} key-value heads do not divide {H} query heads")
    if B % rows or K % heads:
        raise ValueError(f"{B} rows and {K} key-value heads do not divide over a mesh of {rows} x {heads}")


def splash_attention(
    q_BSHh: Float[Array, "B S H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    prompt_len_B: Int[Array, " B"],
    *,
    prompt: int,
    completion: int,
    window: int | None = None,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    interpret: bool = False,
) -> Float[Array, "B S H h"]:
    """Grouped-query attention over a shared prompt: ``softmax(q k^T / sqrt(h) + mask) v``, softmax in float32.

    The kernel is JAX's own, ``jax.experimental.pallas.ops.tpu.splash_attention``, forward and backward.
    Outputs at padding are finite and mean nothing.

    Args:
      q_BSHh, k_BSKh, v_BSKh: rows of ``prompt`` tokens, padded on the left, and completions, padded on the right.
      prompt_len_B: real tokens of each prompt.
      prompt: tokens of the prompt part of a row, padding included.
      completion: tokens of each completion, padding included.
      window: how many of the latest tokens a token sees, itself included (None: all).
      softcap: c of ``c tanh(score / c)`` in place of scores (None: scores as they are).
      mesh: devices to split rows over ``batch_axes`` and heads over ``head_axis``: a kernel cannot be split for us.
      interpret: run the kernel's steps as plain JAX operations, for machines without a TPU.

    Raises:
      ValueError: the row is not a prompt and whole completions, or rows or heads do not divide over the mesh.
    """
    sizes = dict(mesh.shape) if mesh is not None else {}
    _check(q_BSHh, k_BSKh, prompt, completion, math.prod(sizes.get(a, 1) for a in batch_axes), sizes.get(head_axis, 1))

    def local(q: Array, k: Array, v: Array, prompt_len: Array) -> Array:
        form = {"prompt": prompt, "completion": completion, "window": window, "softcap": softcap}
        return _rows(q, k, v, prompt_len, **form, interpret=interpret)  # type: ignore[arg-type]

    if mesh is None or mesh.size == 1:
        return local(q_BSHh, k_BSKh, v_BSKh, prompt_len_B)
    batch = tuple(a for a in batch_axes if a in sizes)
    by_head = PartitionSpec(batch, None, head_axis if head_axis in sizes else None, None)
    specs = (by_head, by_head, by_head, PartitionSpec(batch))
    # Pallas does not say over which axes its outputs vary, so there is nothing for check_vma to check.
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    return split(q_BSHh, k_BSKh, v_BSKh, prompt_len_B)
