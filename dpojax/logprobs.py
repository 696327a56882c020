"""From hidden states to log-probabilities of completions: the only place where tokens are shifted."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpojax.types import (
    ApplyFn,
    CompletionStats,
    LabelledLogps,
    PairBatch,
    PairLogps,
    PyTree,
    Rows,
    States,
    completion_mask,
)


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
        # Without the barrier, XLA's CPU compiler would gather these again for every logit.
        g, target, normaliser = jax.lax.optimization_barrier((g, target, normaliser))
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


def token_squares(h_RZD: Float[Array, "R Z D"], head_VD: Float[Array, "V D"], chunk_tokens: int) -> Float[Array, "R Z"]:
    """``log sum_v p(v)^2`` of every token's distribution p, in chunks; without a gradient."""

    def of_chunk(h: Float[Array, "R z D"]) -> Float[Array, "R z"]:
        return jax.nn.logsumexp(2 * jax.nn.log_softmax(_logits(h, head_VD)), axis=-1)

    h_RZD, head_VD = jax.lax.stop_gradient((h_RZD, head_VD))
    R, Z = h_RZD.shape[:2]
    return jnp.moveaxis(jax.lax.map(of_chunk, _chunks(h_RZD, chunk_tokens)), 0, 1).reshape(R, -1)[:, :Z]


def token_kls(
    ref: States, h_RZD: Float[Array, "R Z D"], head_VD: Float[Array, "V D"], chunk_tokens: int
) -> Float[Array, "R Z"]:
    """``KL(reference || policy)`` of every token's distributions, nats, in chunks that are computed again backward."""

    assert ref.head is not None
    ref_head = ref.head

    @jax.checkpoint
    def of_chunk(chunk: tuple[Array, Array]) -> Float[Array, "R z"]:
        ref_h, h = chunk
        ref_logp, logp = jax.nn.log_softmax(_logits(ref_h, ref_head)), jax.nn.log_softmax(_logits(h, head_VD))
        return jnp.sum(jnp.exp(ref_logp) * (ref_logp - logp), axis=-1)

    R, Z = h_RZD.shape[:2]
    chunks = (_chunks(ref.hidden, chunk_tokens), _chunks(h_RZD, chunk_tokens))
    return jnp.moveaxis(jax.lax.map(of_chunk, chunks), 0, 1).reshape(R, -1)[:, :Z]


def completion_stats(
    apply_fn: ApplyFn,
    params: PyTree,
    batch: PairBatch,
    *,
    chunk_tokens: int = 512,
    reads: frozenset[str] = frozenset(),
    ref: States | None = None,
) -> CompletionStats:
    """Sums of log-probabilities of every completion, and from the same pass what else is asked for.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: prompts with N completions each.
      chunk_tokens: completion tokens whose logits exist at one time, counted over the batch.
      reads: of ``tokens``, ``squares``, ``kl`` and ``states``.
      ref: the reference's distributions, for ``kl``.
    """
    B, N, C = batch.completions.shape
    rows = pack_rows(batch)
    h_RTD, head_VD = apply_fn(params, rows)
    _, scored = streams(batch)
    R = scored.shape[0]
    real = pick(completion_mask(batch).reshape(R, -1), scored)
    h_RZD = jnp.take_along_axis(h_RTD, predictors(rows, scored, N)[..., None], axis=1, mode="clip")
    h_RZD = jnp.where(real[..., None], h_RZD, 0)  # a masked NaN would still have a NaN gradient
    places = inverse(scored, B // R * N * C)

    def grid(values: Float[Array, "R Z"]) -> Float[Array, "B N C"]:
        return pick(jnp.where(real, values, 0.0), places).reshape(B, N, C)

    tokens = grid(token_logps(h_RZD, head_VD, pick(batch.completions.reshape(R, -1), scored), chunk_tokens))
    stats = CompletionStats(jnp.sum(tokens, axis=-1), tokens if "tokens" in reads else None)
    if "squares" in reads:
        squares = jnp.sum(grid(token_squares(h_RZD, head_VD, chunk_tokens)), axis=-1)
        stats = dataclasses.replace(stats, squares=squares)
    if "kl" in reads:
        assert ref is not None, "KL needs the reference's distributions"
        stats = dataclasses.replace(stats, kl=jnp.sum(grid(token_kls(ref, h_RZD, head_VD, chunk_tokens)), axis=-1))
    return dataclasses.replace(stats, states=States(h_RZD, head_VD)) if "states" in reads else stats


def completion_rewards(apply_fn: ApplyFn, params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
    """A reward model's score of every completion: ``w . h`` of the hidden state at its last token, the EOS."""
    B, N, C = batch.completions.shape
    P = batch.prompt.shape[1]
    rows = pack_rows(batch)
    h_RTD, score_1D = apply_fn(params, rows)
    R = rows.tokens.shape[0]
    start = (jnp.arange(B) % (B // R))[:, None] * (P + N * C) + P + jnp.arange(N)[None] * C
    places = (start + jnp.maximum(batch.completion_len, 1) - 1).reshape(R, -1)
    slots = jnp.take_along_axis(rows.slots, places, axis=1)
    # What only fills up has no slot; its score is masked.
    last_RZD = jnp.take_along_axis(h_RTD, jnp.minimum(slots, h_RTD.shape[1] - 1)[..., None], axis=1)
    scores = jnp.einsum("rzd,vd->rzv", last_RZD.astype(jnp.float32), score_1D.astype(jnp.float32))
    return scores.reshape(B, N)


def completion_logps(
    apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 512
) -> Float[Array, "B N"]:
    r"""``log pi(y|x) = sum_t log pi(y_t | x, y_<t)`` of every completion, ``[B, N]``, float32, nats."""
    return completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens).sums


def pair_up(stats: CompletionStats, batch: PairBatch) -> PairLogps:
    """Every two completions of a prompt as a pair, the better one chosen, prompt by prompt: ``[B * N (N - 1) / 2]``.

    Two of one rank, and what only fills up, are pairs without tokens. Arrays may be JAX's or NumPy's. Margins are the
    differences of scores.
    """
    N = batch.completion_len.shape[1]
    i, j = np.triu_indices(N, 1)

    def sides(x: Any) -> tuple[Any, Any]:
        return x[:, i].reshape(-1, *x.shape[2:]), x[:, j].reshape(-1, *x.shape[2:])

    chosen_len, rejected_len = sides(batch.completion_len)
    there = (chosen_len > 0) & (rejected_len > 0) & (batch.real.repeat(len(i), axis=0) > 0)
    if batch.rank is not None:
        better, worse = sides(batch.rank)
        there &= better < worse
    fields: dict[str, Any] = {"chosen_len": chosen_len * there, "rejected_len": rejected_len * there}
    for name, suffix in {"sums": "", "tokens": "_tokens", "squares": "_squares", "kl": "_kl"}.items():
        x = getattr(stats, name)
        if x is not None:
            fields[f"chosen{suffix}"], fields[f"rejected{suffix}"] = sides(x)
    if batch.score is not None:
        better, worse = sides(batch.score)
        fields["margin"] = better - worse
    for name in ("weight", "key"):
        x = getattr(batch, name)
        fields[name] = x if x is None or N == 2 else x.repeat(len(i), axis=0)
    return PairLogps(**fields, states=stats.states)


def label(stats: CompletionStats, batch: PairBatch) -> LabelledLogps:
    """Each row's completion with its label; a second completion is the mismatched one."""
    mismatched = stats.sums[:, 1] if stats.sums.shape[1] > 1 else None
    assert batch.label is not None
    lengths = batch.completion_len[:, 0] * (batch.real > 0)
    return LabelledLogps(stats.sums[:, 0], lengths, batch.label, mismatched)


def pair_logps(
    apply_fn: ApplyFn,
    params: PyTree,
    batch: PairBatch,
    *,
    chunk_tokens: int = 512,
    reads: frozenset[str] = frozenset(),
    ref: States | None = None,
) -> PairLogps:
    r"""Log-probabilities of both sides of every pair: sums over completion tokens, EOS included, prompt excluded.

    .. math:: \log \pi(y|x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t})

    Source: the chain rule; Rafailov et al. 2023 (arXiv 2305.18290) uses these sums in equation 7.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: pairs, ``completions [B, 2, C]``, or more completions of each prompt (:func:`pair_up`).
      chunk_tokens: completion tokens whose logits exist at one time, counted over the batch.
      reads: what else an objective reads (:class:`~dpojax.losses.traits.Traits`).
      ref: the reference's distributions, where ``kl`` is read.

    Returns:
      :class:`~dpojax.types.PairLogps`, ``[B]`` a field, float32, nats.
    """
    stats = completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=reads, ref=ref)
    return pair_up(stats, batch)
