"""From hidden states to log-probabilities of completions: the only place where tokens are shifted."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dpojax.compiler import barrier
from dpojax.packing import (
    ApplyFn,
    PairBatch,
    completion_mask,
    gather,
    inverse,
    last_index,
    model_input,
    packing_of,
    predictor_index,
    target_len,
)
from dpojax.sharding import RULES
from dpojax.types import (
    STATISTICS,
    CompletionStats,
    Head,
    LabelledLogps,
    PairLogps,
    PyTree,
    ReferenceOutput,
    Sides,
    Unembedding,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(
    h_RZD: Float[Array, "R Z D"], head: Head, targets: Int[Array, "R Z"], chunk_tokens: int
) -> Float[Array, "R Z"]:
    """``log softmax(logits)[target]`` of every token, float32 whatever the dtype of ``h``; the logits are
    ``h @ head.T``, or what an :class:`~dpojax.types.Unembedding` says.

    The vocabulary projection runs over chunks of about ``chunk_tokens`` tokens (counted over the packed sequences). The
    backward pass is made by hand: with p the softmax, ``dlogits = g * (onehot(target) - p)``, chunk by chunk. Logits
    that fit into one chunk are kept for it, others are projected again, so no array ever holds more than one chunk's.
    """
    return _token_logps_forward(h_RZD, head, targets, chunk_tokens)[0]


def _chunks(x: Array, chunk_tokens: int) -> Array:
    """``[R, Z, ...] -> [chunks, R, z, ...]``, padded."""
    R, Z = x.shape[:2]
    n = -(-R * Z // chunk_tokens)
    width = -(-Z // n)
    x = jnp.pad(x, [(0, 0), (0, n * width - Z)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(R, n, width, *x.shape[2:]), 1, 0)


def whole_head(head: Head) -> Unembedding:
    """The unembedding, also where its matrix alone is given."""
    return head if isinstance(head, Unembedding) else Unembedding(head)


def logits_of(h: Float[Array, "R z D"], head: Head) -> Float[Array, "R z V"]:
    """The logits of hidden states, float32."""
    head = whole_head(head)
    z = jnp.einsum("rzd,vd->rzv", h, head.matrix.astype(h.dtype), preferred_element_type=jnp.float32)
    z = z if head.bias is None else z + head.bias.astype(jnp.float32)[None, None]
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def _token_logps_forward(
    h_RZD: Float[Array, "R Z D"], head: Head, targets: Int[Array, "R Z"], chunk_tokens: int
) -> tuple[Float[Array, "R Z"], tuple]:
    def forward(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        h, target = chunk
        logits = logits_of(h, head)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - normaliser, normaliser, logits

    R, Z = targets.shape
    if chunk_tokens >= R * Z:
        logps, normaliser, logits = forward((h_RZD, targets))
        return logps, (h_RZD, head, targets, normaliser[None], logits)
    chunks = (_chunks(h_RZD, chunk_tokens), _chunks(targets, chunk_tokens))
    logps, normaliser = jax.lax.map(lambda chunk: forward(chunk)[:2], chunks)
    return jnp.moveaxis(logps, 0, 1).reshape(R, -1)[:, :Z], (h_RZD, head, targets, normaliser, None)


def _token_logps_backward(
    chunk_tokens: int, kept: tuple, g_RZ: Float[Array, "R Z"]
) -> tuple[Float[Array, "R Z D"], Head, None]:
    h_RZD, head, targets, normaliser, logits = kept
    matrix, bias, softcap = (getattr(whole_head(head), name) for name in ("matrix", "bias", "softcap"))
    vocab = jnp.arange(matrix.shape[0])[None, None, :]

    def backward(
        h: Array, target: Array, normaliser: Array, g: Array, logits: Array | None = None
    ) -> tuple[Float[Array, "R z D"], Unembedding]:
        logits = logits_of(h, head) if logits is None else logits
        # Without the barrier, XLA's CPU compiler would gather these again for every logit.
        g, target, normaliser = barrier((g, target, normaliser))
        p = jnp.exp(logits - normaliser[..., None])
        dlogits = g[..., None] * ((vocab == target[..., None]) - p)
        if softcap is not None:
            dlogits = dlogits * (1 - jnp.square(logits / softcap))
        # Without the barrier, XLA would compute the softmax once for each of the two products.
        dlogits = barrier(dlogits.astype(h.dtype))
        dh = jnp.einsum("rzv,vd->rzd", dlogits, matrix.astype(h.dtype))
        dmatrix = jnp.einsum("rzv,rzd->vd", dlogits, h, preferred_element_type=jnp.float32)
        dbias = None if bias is None else jnp.sum(dlogits, axis=(0, 1), dtype=jnp.float32)
        return dh, Unembedding(dmatrix, dbias, softcap)

    def cast(dhead: Unembedding) -> Head:
        cast = jax.tree.map(lambda d, x: d.astype(x.dtype), dhead, whole_head(head))
        return cast if isinstance(head, Unembedding) else cast.matrix

    if logits is not None:
        dh, dhead = backward(h_RZD, targets, normaliser[0], g_RZ, logits)
        return dh, cast(dhead), None

    def add(dhead: Unembedding, chunk: tuple) -> tuple[Unembedding, Array]:
        dh, more = backward(*chunk)
        return jax.tree.map(jnp.add, dhead, more), dh

    h, target, g = (_chunks(x, chunk_tokens) for x in (h_RZD, targets, g_RZ))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), whole_head(head))
    dhead, dh = jax.lax.scan(add, zeros, (h, target, normaliser, g))
    R, Z = targets.shape
    return jnp.moveaxis(dh, 0, 1).reshape(R, -1, h_RZD.shape[-1])[:, :Z], cast(dhead), None


token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def by_chunk(function: Callable[..., Array], chunk_tokens: int, *hidden: Float[Array, "R Z D"]) -> Float[Array, "R Z"]:
    """``function`` of the hidden states, applied to chunks of about ``chunk_tokens`` tokens one after another."""
    R, Z = hidden[0].shape[:2]
    chunks = tuple(_chunks(h, chunk_tokens) for h in hidden)
    return jnp.moveaxis(jax.lax.map(lambda chunk: function(*chunk), chunks), 0, 1).reshape(R, -1)[:, :Z]


def token_squares(h_RZD: Float[Array, "R Z D"], head: Head, chunk_tokens: int) -> Float[Array, "R Z"]:
    """``log sum_v p(v)^2`` of every token's distribution p, in chunks; without a gradient."""
    h_RZD, head = jax.lax.stop_gradient((h_RZD, head))

    def of_chunk(h: Float[Array, "R z D"]) -> Float[Array, "R z"]:
        return jax.nn.logsumexp(2 * jax.nn.log_softmax(logits_of(h, head)), axis=-1)

    return by_chunk(of_chunk, chunk_tokens, h_RZD)


def token_kls(
    p_hidden: Float[Array, "R Z D"],
    p_head: Head,
    q_hidden: Float[Array, "R Z D"],
    q_head: Head,
    chunk_tokens: int,
) -> Float[Array, "R Z"]:
    r"""Exact ``KL(p || q) = sum_v p(v) (log p(v) - log q(v))`` of every token's distributions, nats.

    Each distribution is the softmax of ``hidden @ head.T``. Chunks are computed again in the backward pass.
    """

    @jax.checkpoint
    def of_chunk(p_h: Float[Array, "R z D"], q_h: Float[Array, "R z D"]) -> Float[Array, "R z"]:
        p, q = jax.nn.log_softmax(logits_of(p_h, p_head)), jax.nn.log_softmax(logits_of(q_h, q_head))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return by_chunk(of_chunk, chunk_tokens, p_hidden, q_hidden)


def _squares(h: Array, head: Head, ref: ReferenceOutput | None, chunk_tokens: int) -> Float[Array, "R Z"]:
    return token_squares(h, head, chunk_tokens)


def _kl(h: Array, head: Head, ref: ReferenceOutput | None, chunk_tokens: int) -> Float[Array, "R Z"]:
    assert ref is not None and ref.hidden is not None and ref.head is not None, "KL needs the reference's distributions"
    return token_kls(ref.hidden, ref.head, h, head, chunk_tokens)


TOKEN_STATISTICS: dict[str, Callable[..., Float[Array, "R Z"]]] = {"squares": _squares, "kl": _kl}
"""``(hidden, head, reference, chunk_tokens) -> [R, Z]`` by name; a completion's statistic is the sum over its tokens.
A further one is a row here, and a field of this name of CompletionStats and of PairLogps."""


def token_values(
    h_RZD: Float[Array, "R Z D"],
    head: Head,
    targets: Int[Array, "R Z"],
    chunk_tokens: int,
    reads: frozenset[str] = frozenset(),
    ref: ReferenceOutput | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, "R Z"]]:
    """Every token's log-probability (``logps``) and the statistics of it that are read, by name.

    On a mesh every device computes those of its own tokens, ``chunk_tokens`` at a time. It gathers the unembedding
    once, in the compute dtype, and where devices split the vocabulary too, its part of that. The unembedding's
    gradient is added up over a device's chunks in float32, and over the devices once, in the compute dtype, as the
    layers' are.
    """

    rows = {name: statistic for name, statistic in TOKEN_STATISTICS.items() if name in reads}

    def of_own(h: Array, targets: Array, theirs: Array | None, head: Head, other: Head | None) -> dict[str, Array]:
        known = None if ref is None else ReferenceOutput(None, theirs, other)  # type: ignore[arg-type]  # no sums are read
        values = {name: statistic(h, head, known, chunk_tokens) for name, statistic in rows.items()}
        return {"logps": token_logps(h, head, targets, chunk_tokens), **values}

    theirs, other = (None, None) if ref is None else (ref.hidden, ref.head)
    if mesh is None or mesh.size == 1:
        return of_own(h_RZD, targets, theirs, head, other)

    def gathered(x: Array) -> Array:
        x = x.astype(h_RZD.dtype)
        if x.ndim == 1 or not by_compiler:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(RULES.vocab)))

    def on_device(h: Array, targets: Array, theirs: Array | None, *heads: Head | None) -> dict[str, Array]:
        def whole(x: Array) -> Array:
            if x.ndim == 1 or by_compiler:
                return x
            return jax.lax.all_gather(x, RULES.mesh_axes("embed"), axis=1, tiled=True)

        return of_own(h, targets, theirs, *jax.tree.map(whole, heads))

    # Axes that split the vocabulary stay with the compiler, which splits the products and the sums over it. It cannot
    # split a gather that we write, and makes one of its own.
    by_compiler = {axis for axis in RULES.mesh_axes("vocab") if mesh.shape[axis] > 1}
    heads = jax.tree.map(gathered, (head, other))
    by_row, everywhere = PartitionSpec(RULES.batch), PartitionSpec()
    by_width = everywhere if by_compiler else PartitionSpec(None, RULES.embed)
    specs = (by_row, by_row, by_row, *jax.tree.map(lambda x: by_width if x.ndim == 2 else everywhere, heads))
    own = set(mesh.axis_names) - by_compiler
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=by_row, axis_names=own, check_vma=False)
    return split(h_RZD, targets, theirs, *heads)


def completion_stats(
    apply_fn: ApplyFn,
    params: PyTree,
    batch: PairBatch,
    *,
    chunk_tokens: int = 512,
    reads: frozenset[str] = frozenset(),
    ref: ReferenceOutput | None = None,
    mesh: Mesh | None = None,
) -> CompletionStats:
    """Sums of log-probabilities of every completion, and from the same pass the statistics that are asked for.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: prompts with N completions each.
      chunk_tokens: completion tokens whose logits exist at one time on a device.
      reads: statistics (:data:`~dpojax.types.STATISTICS`), and ``hidden``.
      ref: the reference's distributions, for ``kl``.
      mesh: the devices that the batch lies on (default: one).
    """
    B, N, C = batch.completions.shape
    inputs = model_input(batch)
    h_RTD, head = apply_fn(params, inputs)
    target_index = packing_of(batch).target_index
    R = target_index.shape[0]
    mask = gather(completion_mask(batch).reshape(R, -1), target_index)
    h_RZD = jnp.take_along_axis(h_RTD, predictor_index(inputs, target_index, N)[..., None], axis=1, mode="clip")
    h_RZD = jnp.where(mask[..., None], h_RZD, 0)  # a masked NaN would still have a NaN gradient
    packed_index = inverse(target_index, B // R * N * C)

    def padded(values: Float[Array, "R Z"]) -> Float[Array, "B N C"]:
        return gather(jnp.where(mask, values, 0.0), packed_index).reshape(B, N, C)

    targets = gather(batch.completions.reshape(R, -1), target_index)
    values = {name: padded(x) for name, x in token_values(h_RZD, head, targets, chunk_tokens, reads, ref, mesh).items()}
    tokens = values.pop("logps")
    stats: dict[str, Array] = {name: jnp.sum(x, axis=-1) for name, x in values.items()}
    sums = jnp.sum(tokens, axis=-1)
    if batch.loss_mask is not None:  # objectives find a completion's tokens by its length, from the left
        tokens = jnp.take_along_axis(tokens, jnp.argsort(~completion_mask(batch), axis=-1, stable=True), axis=-1)
    stats |= {name: x for name, x in (("tokens", tokens), ("hidden", h_RZD)) if name in reads}
    return CompletionStats(sums, **stats)


def completion_rewards(apply_fn: ApplyFn, params: PyTree, batch: PairBatch) -> Float[Array, "B N"]:
    """A reward model's score of every completion: ``w . h`` of the hidden state at its last token, the EOS."""
    inputs = model_input(batch)
    h_RTD, score_1D = apply_fn(params, inputs)
    last_RZD = jnp.take_along_axis(h_RTD, last_index(inputs, batch.completion_len)[..., None], axis=1)
    scores = logits_of(last_RZD.astype(jnp.float32), score_1D)
    return scores.reshape(batch.completion_len.shape)


def completion_values(apply_fn: ApplyFn, params: PyTree, batch: PairBatch) -> Float[Array, "B N C"]:
    """A value model's score before every token of a completion, 0 beyond its end: ``w . h`` of the hidden state that
    would predict the token, which has seen the prompt and the tokens before it."""
    inputs = model_input(batch)
    h_RTD, score_1D = apply_fn(params, inputs)
    target_index, (_, N, C) = packing_of(batch).target_index, batch.completions.shape
    h_RZD = jnp.take_along_axis(h_RTD, predictor_index(inputs, target_index, N)[..., None], axis=1, mode="clip")
    values = logits_of(h_RZD.astype(jnp.float32), score_1D)[..., 0]
    rows = len(batch.prompt_len) // len(target_index)
    padded = gather(values, inverse(target_index, rows * N * C)).reshape(batch.completions.shape)
    return jnp.where(completion_mask(batch), padded, 0.0)


def completion_logps(
    apply_fn: ApplyFn, params: PyTree, batch: PairBatch, *, chunk_tokens: int = 512, mesh: Mesh | None = None
) -> Float[Array, "B N"]:
    r"""``log pi(y|x) = sum_t log pi(y_t | x, y_<t)`` of every completion, ``[B, N]``, float32, nats."""
    return completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, mesh=mesh).sums


def pair_up(stats: CompletionStats, batch: PairBatch) -> PairLogps:
    """Every two completions of a prompt as a pair, the better one chosen, prompt by prompt: ``[B * N (N - 1) / 2]``.

    Tied completions and padding rows become pairs of length 0, which every reduction masks out. Arrays may be JAX's or
    NumPy's. Margins are the differences of scores.
    """
    N = batch.completion_len.shape[1]
    i, j = np.triu_indices(N, 1)

    def sides(x: Any) -> Sides:
        return Sides(*(x[:, k].reshape(-1, *x.shape[2:]) for k in (i, j)))

    notes = batch.annotations
    chosen_len, rejected_len = sides(target_len(batch))
    valid = (chosen_len > 0) & (rejected_len > 0) & (batch.valid.repeat(len(i), axis=0) > 0)
    if notes.rank is not None:
        better, worse = sides(notes.rank)
        valid &= better < worse
    chosen, rejected = sides(stats.sums)
    fields: dict[str, Any] = {name: sides(x) for name in STATISTICS if (x := getattr(stats, name)) is not None}
    if notes.score is not None:
        better, worse = sides(notes.score)
        fields["margin"] = better - worse
    for name, x in (("weight", notes.weight), ("key", batch.key)):
        fields[name] = x if x is None or N == 2 else x.repeat(len(i), axis=0)
    return PairLogps(chosen, rejected, chosen_len * valid, rejected_len * valid, **fields)


def labelled_logps(stats: CompletionStats, batch: PairBatch) -> LabelledLogps:
    """Each row's completion with its label; a second completion is the mismatched one."""
    mismatched = stats.sums[:, 1] if stats.sums.shape[1] > 1 else None
    assert batch.annotations.label is not None
    lengths = target_len(batch)[:, 0] * (batch.valid > 0)
    return LabelledLogps(stats.sums[:, 0], lengths, batch.annotations.label, mismatched)


def pair_logps(
    apply_fn: ApplyFn,
    params: PyTree,
    batch: PairBatch,
    *,
    chunk_tokens: int = 512,
    reads: frozenset[str] = frozenset(),
    ref: ReferenceOutput | None = None,
    mesh: Mesh | None = None,
) -> PairLogps:
    r"""Log-probabilities of both sides of every pair: sums over completion tokens, EOS included, prompt excluded.

    .. math:: \log \pi(y|x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t})

    Source: the chain rule; Rafailov et al. 2023 (arXiv 2305.18290) uses these sums in equation 7.

    Args:
      apply_fn: the model, as :class:`~dpojax.types.ApplyFn`.
      params: its parameters.
      batch: pairs, ``completions [B, 2, C]``, or more completions of each prompt (:func:`pair_up`).
      chunk_tokens: completion tokens whose logits exist at one time on a device.
      reads: what else an objective reads (:class:`~dpojax.losses.traits.Traits`).
      ref: the reference's distributions, where ``kl`` is read.
      mesh: the devices that the batch lies on (default: one).

    Returns:
      :class:`~dpojax.types.PairLogps`, ``[B]`` a field, float32, nats.
    """
    stats = completion_stats(apply_fn, params, batch, chunk_tokens=chunk_tokens, reads=reads, ref=ref, mesh=mesh)
    return pair_up(stats, batch)
