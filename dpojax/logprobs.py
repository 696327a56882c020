"""From hidden states to log-probabilities of completions: the only place where tokens are shifted."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.types import ApplyFn, PairBatch, PairLogps, PyTree, completion_mask


def pack_rows(batch: PairBatch) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
    """One row a prompt: the prompt once, then its completions, which see the prompt and themselves only.

    The prompt is computed once per pair instead of once per completion (the idea of arXiv 2410.20305); values and
    gradients are those of N separate rows.

    Returns:
      ``(tokens, positions, segments)``, each ``[B, P + N * C]``; segments as in :class:`~dpojax.types.ApplyFn`.
      Every completion's positions continue from its prompt's end.
    """
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    prompt_positions = jnp.arange(P)[None, :] - (P - batch.prompt_len[:, None])
    prompt_segments = jnp.where(prompt_positions >= 0, 0, -1)
    completion_positions = jnp.broadcast_to(batch.prompt_len[:, None, None] + jnp.arange(C)[None, None], (B, N, C))
    completion_segments = jnp.where(completion_mask(batch), jnp.arange(1, N + 1)[None, :, None], -1)

    def row(prompt: Int[Array, "B P"], completions: Int[Array, "B N C"]) -> Int[Array, "B T"]:
        return jnp.concatenate([prompt, completions.reshape(B, N * C)], axis=1)

    return (
        row(batch.prompt, batch.completions),
        row(jnp.maximum(prompt_positions, 0), completion_positions),
        row(prompt_segments, completion_segments),
    )


def predictors(h_BTD: Float[Array, "B T D"], batch: PairBatch) -> Float[Array, "B N C D"]:
    """The hidden states that predict the completions' tokens: the prompt's last, then each completion's but its last.

    Prompts are padded on the left, so these are slices at fixed places; nothing is gathered.
    """
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    last_of_prompt = jnp.broadcast_to(h_BTD[:, None, P - 1 : P], (B, N, 1, h_BTD.shape[-1]))
    within = h_BTD[:, P:].reshape(B, N, C, -1)[:, :, :-1]
    return jnp.concatenate([last_of_prompt, within], axis=2)


def chunked_logps(
    h_BNCD: Float[Array, "B N C D"],
    head_VD: Float[Array, "V D"],
    targets: Int[Array, "B N C"],
    mask: Bool[Array, "B N C"],
    *,
    chunk_tokens: int,
) -> Float[Array, "B N"]:
    """Sum over a completion of ``log softmax(h @ head.T)[target]``, float32 whatever the dtype of ``h``.

    The vocabulary projection runs over chunks of about ``chunk_tokens`` completion positions (counted over the
    batch), in the forward and in the backward pass, which projects a chunk again rather than keep its logits: no
    array ever holds more than one chunk's logits.
    """
    B, N, C = targets.shape
    n_chunks = -(-C // max(1, chunk_tokens // (B * N)))
    width = -(-C // n_chunks)
    fill = n_chunks * width - C
    h_BNCD = jnp.where(mask[..., None], h_BNCD, 0)  # a masked NaN would still have a NaN gradient

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(B, N, n_chunks, width, *x.shape[3:]), 2, 0)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def body(total: Float[Array, "B N"], chunk: tuple[Array, Array, Array]) -> tuple[Float[Array, "B N"], None]:
        h, target, keep = chunk
        logits = jnp.einsum("bncd,vd->bncv", h, head_VD.astype(h.dtype), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        logps = picked - jax.nn.logsumexp(logits, axis=-1)
        return total + jnp.sum(jnp.where(keep, logps, 0.0), axis=-1), None

    start = jnp.zeros((B, N), jnp.float32)
    total, _ = jax.lax.scan(body, start, (chunks(h_BNCD), chunks(targets), chunks(mask)))
    return total


def completion_logps(
    apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 128
) -> Float[Array, "B N"]:
    r"""``log pi(y|x) = sum_t log pi(y_t | x, y_<t)`` of every completion, ``[B, N]``, float32, nats."""
    h_BTD, head_VD = apply_fn(params, *pack_rows(batch))
    return chunked_logps(
        predictors(h_BTD, batch), head_VD, batch.completions, completion_mask(batch), chunk_tokens=chunk_tokens
    )


def pair_logps(apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 128) -> PairLogps:
    r"""Log-probabilities of both sides of every pair: sums over completion tokens, EOS included, prompt excluded.

    .. math:: \log \pi(y|x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t})

    Source: the chain rule; Rafailov et al. 2023 (arXiv 2305.18290) uses these sums in equation 7.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: pairs, ``completions [B, 2, C]``.
      chunk_tokens: completion positions whose logits exist at one time, counted over the batch.

    Returns:
      :class:`~dpojax.types.PairLogps`, ``[B]`` a field, float32, nats.
    """
    sums = completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)
    chosen_len, rejected_len = batch.completion_len[:, 0], batch.completion_len[:, 1]
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_len=chosen_len, rejected_len=rejected_len)
