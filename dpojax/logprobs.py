"""From hidden states to log-probabilities of completions: the only place where tokens are shifted."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.types import ApplyFn, PairBatch, PairLogps, PyTree, Rows, completion_mask


def pick(x: Array, index: Int[Array, "R n"]) -> Array:
    """``x[r, index[r, i]]``; zero where an index is beyond the end."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def inverse(index: Int[Array, "R n"], size: int) -> Int[Array, "R size"]:
    """Where each of ``0 .. size - 1`` stands in ``index``; n, beyond the end, where it does not."""
    R, n = index.shape
    nowhere = jnp.full((R, size), n, jnp.int32)
    return nowhere.at[jnp.arange(R)[:, None], index].set(jnp.arange(n, dtype=jnp.int32)[None], mode="drop")


def streams(batch: PairBatch) -> tuple[Int[Array, "R T"], Int[Array, "R Z"]]:
    """The batch's streams and scored places: as packed, or else the grid as it is, a stream a row."""
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    if batch.stream is not None and batch.scored is not None:
        return batch.stream, batch.scored
    whole = lambda size: jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (B, size))  # noqa: E731
    return whole(P + N * C), whole(N * C)


def pack_rows(batch: PairBatch) -> Rows:
    """A batch as the model reads it: a pair's prompt once, then its completions, which see it and themselves only.

    The prompt is computed once per pair instead of once per completion (the idea of arXiv 2410.20305); values and
    gradients are those of N separate rows. Every completion's positions continue from its prompt's end.
    """
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    places, _ = streams(batch)
    R = places.shape[0]
    prompt_positions = jnp.arange(P)[None, :] - (P - batch.prompt_len[:, None])
    completion_positions = batch.prompt_len[:, None, None] + jnp.arange(C)[None, None]
    completion_positions = jnp.broadcast_to(completion_positions, (B, N, C))

    def of_grid(prompt: Int[Array, "B P"], completions: Int[Array, "B N C"]) -> Int[Array, "R T"]:
        grid = jnp.concatenate([prompt, completions.reshape(B, N * C)], axis=1)
        return pick(grid.reshape(R, -1), places)

    return Rows(
        tokens=of_grid(batch.prompt, batch.completions),
        positions=of_grid(jnp.maximum(prompt_positions, 0), completion_positions),
        places=places,
        slots=inverse(places, B // R * (P + N * C)),
        prompt_len=batch.prompt_len,
        prompt=P,
        completion=C,
        hidden=batch.hidden,
    )


def predictors(rows: Rows, scored: Int[Array, "R Z"], N: int) -> Int[Array, "R Z"]:
    """The slots whose hidden states predict the scored tokens: of the prompt's last token for a completion's first,
    of the token before it for any other."""
    P, C = rows.prompt, rows.completion
    row, place = jnp.divmod(scored, N * C)
    before = jnp.where(place % C == 0, P - 1, P + place - 1)
    slots = jnp.take_along_axis(rows.slots, row * (P + N * C) + before, axis=1, mode="clip")
    # An empty place predicts from some slot too; its log-probability is masked.
    return jnp.minimum(slots, rows.tokens.shape[1] - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(
    h_RZD: Float[Array, "R Z D"], head_VD: Float[Array, "V D"], targets: Int[Array, "R Z"], chunk_tokens: int
) -> Float[Array, "R Z"]:
    """``log softmax(h @ head.T)[target]`` of every token, float32 whatever the dtype of ``h``.

    The vocabulary projection runs over chunks of about ``chunk_tokens`` tokens (counted over the streams). The
    backward pass is made by hand: with p the softmax, ``dlogits = g * (onehot(target) - p)``, chunk by chunk. Logits
    that fit into one chunk are kept for it, others are projected again, so no array ever holds more than one chunk's.
    """
    return _token_logps_forward(h_RZD, head_VD, targets, chunk_tokens)[0]


def _chunks(x: Array, chunk_tokens: int) -> Array:
    """``[R, Z, ...] -> [chunks, R, z, ...]``, padded."""
    R, Z = x.shape[:2]
    n = -(-R * Z // chunk_tokens)
    width = -(-Z // n)
    x = jnp.pad(x, [(0, 0), (0, n * width - Z)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(R, n, width, *x.shape[2:]), 1, 0)


def _logits(h: Float[Array, "R z D"], head_VD: Float[Array, "V D"]) -> Float[Array, "R z V"]:
    return jnp.einsum("rzd,vd->rzv", h, head_VD.astype(h.dtype), preferred_element_type=jnp.float32)


def _token_logps_forward(
    h_RZD: Float[Array, "R Z D"], head_VD: Float[Array, "V D"], targets: Int[Array, "R Z"], chunk_tokens: int
) -> tuple[Float[Array, "R Z"], tuple]:
    def forward(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        h, target = chunk
        logits = _logits(h, head_VD)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - normaliser, normaliser, logits

    R, Z = targets.shape
    if chunk_tokens >= R * Z:
        logps, normaliser, logits = forward((h_RZD, targets))
        return logps, (h_RZD, head_VD, targets, normaliser[None], logits)
    chunks = (_chunks(h_RZD, chunk_tokens), _chunks(targets, chunk_tokens))
    logps, normaliser = jax.lax.map(lambda chunk: forward(chunk)[:2], chunks)
    return jnp.moveaxis(logps, 0, 1).reshape(R, -1)[:, :Z], (h_RZD, head_VD, targets, normaliser, None)


def _token_logps_backward(
    chunk_tokens: int, kept: tuple, g_RZ: Float[Array, "R Z"]
) -> tuple[Float[Array, "R Z D"], Float[Array, "V D"], None]:
    h_RZD, head_VD, targets, normaliser, logits = kept
    vocab = jnp.arange(head_VD.shape[0])[None, None, :]

    def backward(
        h: Array, target: Array, normaliser: Array, g: Array, logits: Array | None = None
    ) -> tuple[Float[Array, "R z D"], Float[Array, "V D"]]:
        logits = _logits(h, head_VD) if logits is None else logits
        p = jnp.exp(logits - normaliser[..., None])
        dlogits = g[..., None] * ((vocab == target[..., None]) - p)
        # Without the barrier, XLA would compute the softmax once for each of the two products.
        dlogits = jax.lax.optimization_barrier(dlogits.astype(h.dtype))
        dh = jnp.einsum("rzv,vd->rzd", dlogits, head_VD.astype(h.dtype))
        return dh, jnp.einsum("rzv,rzd->vd", dlogits, h, preferred_element_type=jnp.float32)

    if logits is not None:
        dh, dhead = backward(h_RZD, targets, normaliser[0], g_RZ, logits)
        return dh, dhead.astype(head_VD.dtype), None

    def add(dhead: Array, chunk: tuple) -> tuple[Array, Array]:
        dh, more = backward(*chunk)
        return dhead + more, dh

    h, target, g = (_chunks(x, chunk_tokens) for x in (h_RZD, targets, g_RZ))
    dhead, dh = jax.lax.scan(add, jnp.zeros(head_VD.shape, jnp.float32), (h, target, normaliser, g))
    R, Z = targets.shape
    return jnp.moveaxis(dh, 0, 1).reshape(R, -1, h_RZD.shape[-1])[:, :Z], dhead.astype(head_VD.dtype), None


token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def completion_logps(
    apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 512
) -> Float[Array, "B N"]:
    r"""``log pi(y|x) = sum_t log pi(y_t | x, y_<t)`` of every completion, ``[B, N]``, float32, nats."""
    B, N, C = batch.completions.shape
    rows = pack_rows(batch)
    h_RTD, head_VD = apply_fn(params, rows)
    _, scored = streams(batch)
    R = scored.shape[0]
    real = pick(completion_mask(batch).reshape(R, -1), scored)
    h_RZD = jnp.take_along_axis(h_RTD, predictors(rows, scored, N)[..., None], axis=1, mode="clip")
    h_RZD = jnp.where(real[..., None], h_RZD, 0)  # a masked NaN would still have a NaN gradient
    logps = token_logps(h_RZD, head_VD, pick(batch.completions.reshape(R, -1), scored), chunk_tokens)
    grid = pick(jnp.where(real, logps, 0.0), inverse(scored, B // R * N * C))
    return jnp.sum(grid.reshape(B, N, C), axis=-1)


def pair_logps(apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 512) -> PairLogps:
    r"""Log-probabilities of both sides of every pair: sums over completion tokens, EOS included, prompt excluded.

    .. math:: \log \pi(y|x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t})

    Source: the chain rule; Rafailov et al. 2023 (arXiv 2305.18290) uses these sums in equation 7.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: pairs, ``completions [B, 2, C]``.
      chunk_tokens: completion tokens whose logits exist at one time, counted over the batch.

    Returns:
      :class:`~dpojax.types.PairLogps`, ``[B]`` a field, float32, nats.
    """
    sums = completion_logps(apply_fn, params, batch, chunk_tokens=chunk_tokens)
    chosen_len, rejected_len = batch.completion_len[:, 0], batch.completion_len[:, 1]
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_len=chosen_len, rejected_len=rejected_len)
