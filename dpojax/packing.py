"""Padded batches, packed sequences, and the indices between them.

A batch is *padded* where it is made: prompts end, and completions begin, at fixed columns. The model reads it
*packed*: the same tokens without the padding, back to back. Two pairs of P = 3, C = 2, N = 2 on one device (R = 1)::

    padded, S = P + N * C = 7 columns a row         flat index of a token
      .  a  b | c  d | e  .                            .  1  2 | 3  4 | 5  .
      f  g  h | i  . | j  k                            7  8  9 |10  . |12 13

    packed, T = 12 (of 14)         a  b  c  d  e  f  g  h  i  j  k  .
    padded_index [R, T]            1  2  3  4  5  7  8  9 10 12 13 14      14: out of range, padding
    packed_index [R, G]            .  0  1  2  3  4  .  5  6  7  8  . 9 10     the inverse; `.` is out of range (12)

    targets are completion tokens: c d e i j k
    target_index [R, Z], into the row's N * C = 4 completion columns: 0 1 2 | 4 6 7

A prompt is there once; each completion sees it and itself (the idea of arXiv 2410.20305). Attention is computed in
blocks of the padded layout, all else on the packed one.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dpojax.types import Head, PyTree


@struct.dataclass
class Packing:
    """Where the tokens of R packed sequences stand in the padded batch; each sequence packs B / R rows.

    ``padded_index[r, t]`` is the flat index, into the r-th sequence's padded ``[B / R, S]`` tokens, of the token packed
    at position t. ``target_index[r, z]`` is the flat index, into its ``[B / R, N * C]`` completion tokens, of the z-th
    target. An index beyond the end is padding.
    """

    padded_index: Int[Array, "R T"]
    target_index: Int[Array, "R Z"]


@struct.dataclass
class Annotations:
    """The annotations of a batch's completions, from the data; None where it has none.

    ``rank`` orders a prompt's completions (0 the best; two of one rank are no pair; None: as they stand). ``score``
    says by how much: only differences of a row's scores are used. ``weight`` is how much the row counts, ``label`` is
    1 where its completion is desirable.
    """

    rank: Int[Array, "B N"] | None = None
    score: Float[Array, "B N"] | None = None
    weight: Float[Array, " B"] | None = None
    label: Float[Array, " B"] | None = None


@struct.dataclass
class PairBatch:
    """Prompts, each with N completions: N = 2 is (chosen, rejected), N = 1 is SFT's one completion.

    Prompts are padded on the left and completions on the right. Lengths, never token ids, say what is padding
    (pad == eos is normal). ``valid`` is 1 for a row of the data and 0 for padding rows at the end of the last batch.
    ``packing`` is how the model reads it (None: the padded rows as they are). ``hidden`` are packed activations of
    frozen lower layers, from which the layers above go on. ``key`` is a random key for every row. ``loss_mask`` is true
    of the completion tokens that are trained on, where a completion also holds others, such as the results of tools
    (None: all are).
    """

    prompt: Int[Array, "B P"]
    prompt_len: Int[Array, " B"]
    completions: Int[Array, "B N C"]
    completion_len: Int[Array, "B N"]
    valid: Float[Array, " B"]
    packing: Packing | None = None
    annotations: Annotations = struct.field(default_factory=Annotations)
    hidden: Float[Array, "R T D"] | None = None
    key: PRNGKeyArray | None = None
    loss_mask: Bool[Array, "B N C"] | None = None


@struct.dataclass
class ModelInput:
    """Packed tokens, as a model reads them, and the indices that attention needs.

    ``padded_index`` maps packed positions to the padded layout and ``packed_index`` maps back; an index beyond the end
    means no token. ``prompt`` and ``completion`` are P and C. ``hidden``, where given, replaces the embeddings. Without
    ``packed``, the sequences are the padded rows themselves, one each.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    padded_index: Int[Array, "R T"]
    packed_index: Int[Array, "R G"]
    prompt_len: Int[Array, " B"]
    prompt: int = struct.field(pytree_node=False)
    completion: int = struct.field(pytree_node=False)
    hidden: Float[Array, "R T D"] | None = None
    packed: bool = struct.field(pytree_node=False, default=True)


@runtime_checkable
class ApplyFn(Protocol):
    """A model to the floors above it: parameters and packed tokens to hidden states and the unembedding."""

    def __call__(self, params: PyTree, inputs: ModelInput) -> tuple[Float[Array, "R T D"], Head]: ...


def gather(x: Array, index: Int[Array, "R n"]) -> Array:
    """``x[r, index[r, i]]``; zero where an index is beyond the end."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def inverse(index: Int[Array, "R n"], size: int) -> Int[Array, "R size"]:
    """Where each of ``0 .. size - 1`` stands in ``index``; n, beyond the end, where it does not."""
    R, n = index.shape
    nowhere = jnp.full((R, size), n, jnp.int32)
    return nowhere.at[jnp.arange(R)[:, None], index].set(jnp.arange(n, dtype=jnp.int32)[None], mode="drop")


def pack(
    prompt_len: np.ndarray,
    completion_len: np.ndarray,
    P: int,
    C: int,
    sequences: int,
    T: int,
    Z: int,
    loss_mask: np.ndarray | None = None,
) -> Packing:
    """The indices of a padded batch's tokens, row after row without gaps, as NumPy arrays.

    Args:
      prompt_len: ``[B]``.
      completion_len: ``[B, N]``.
      P, C: padded lengths of prompts and of completions, tokens.
      sequences: R, which divides B.
      T, Z: tokens and targets of a packed sequence; at least as many as any of them has.
      loss_mask: ``[B, N, C]``, which completion tokens are targets (default: all).
    """
    B, N = completion_len.shape
    prompt = np.arange(P)[None] >= P - prompt_len[:, None]
    completions = (np.arange(C)[None, None] < completion_len[..., None]).reshape(B, N * C)

    def indices(valid: np.ndarray, width: int) -> Any:
        valid = valid.reshape(sequences, -1)
        out = np.full((sequences, width), valid.shape[1], np.int32)
        for sequence, kept in zip(out, valid, strict=True):
            at = np.flatnonzero(kept)
            sequence[: len(at)] = at
        return out

    targets = completions if loss_mask is None else completions & loss_mask.reshape(B, N * C)
    return Packing(indices(np.concatenate([prompt, completions], axis=1), T), indices(targets, Z))


def packing_of(batch: PairBatch) -> Packing:
    """The batch's packing, or, where it has none, that of the padded rows as they are, a sequence each."""
    if batch.packing is not None:
        return batch.packing
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    every = lambda size: jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (B, size))  # noqa: E731
    return Packing(every(P + N * C), every(N * C))


def completion_mask(batch: PairBatch) -> Bool[Array, "B N C"]:
    """True where a completion column holds a token that is trained on."""
    C = batch.completions.shape[-1]
    there = jax.numpy.arange(C)[None, None, :] < batch.completion_len[:, :, None]
    return there if batch.loss_mask is None else there & batch.loss_mask


def target_len(batch: PairBatch) -> Int[Array, "B N"]:
    """How many tokens of every completion are trained on; arrays may be JAX's or NumPy's."""
    if batch.loss_mask is None:
        return batch.completion_len
    return completion_mask(batch).sum(axis=-1, dtype=batch.completion_len.dtype)


def model_input(batch: PairBatch) -> ModelInput:
    """The batch's packed tokens and their positions: a completion's positions go on from its prompt's end."""
    B, P = batch.prompt.shape
    _, N, C = batch.completions.shape
    padded_index = packing_of(batch).padded_index
    R = padded_index.shape[0]
    prompt_positions = jnp.arange(P)[None, :] - (P - batch.prompt_len[:, None])
    completion_positions = batch.prompt_len[:, None, None] + jnp.arange(C)[None, None]
    completion_positions = jnp.broadcast_to(completion_positions, (B, N, C))

    def packed(prompt: Int[Array, "B P"], completions: Int[Array, "B N C"]) -> Int[Array, "R T"]:
        padded = jnp.concatenate([prompt, completions.reshape(B, N * C)], axis=1)
        return gather(padded.reshape(R, -1), padded_index)

    return ModelInput(
        tokens=packed(batch.prompt, batch.completions),
        positions=packed(jnp.maximum(prompt_positions, 0), completion_positions),
        padded_index=padded_index,
        packed_index=inverse(padded_index, B // R * (P + N * C)),
        prompt_len=batch.prompt_len,
        prompt=P,
        completion=C,
        hidden=batch.hidden,
        packed=batch.packing is not None,
    )


def predictor_index(inputs: ModelInput, target_index: Int[Array, "R Z"], N: int) -> Int[Array, "R Z"]:
    """The packed positions whose hidden states predict the targets: of the prompt's last token for a completion's
    first, of the token before it for any other."""
    P, C = inputs.prompt, inputs.completion
    row, column = jnp.divmod(target_index, N * C)
    before = jnp.where(column % C == 0, P - 1, P + column - 1)
    position = jnp.take_along_axis(inputs.packed_index, row * (P + N * C) + before, axis=1, mode="clip")
    # Padding gets some position too; its log-probability is masked.
    return jnp.minimum(position, inputs.tokens.shape[1] - 1)


def last_index(inputs: ModelInput, completion_len: Int[Array, "B N"]) -> Int[Array, "R BN"]:
    """The packed positions of the completions' last tokens, ``[R, B / R * N]``; some position for an empty one."""
    B, N = completion_len.shape
    R, P, C = inputs.packed_index.shape[0], inputs.prompt, inputs.completion
    start = (jnp.arange(B)[:, None] % (B // R)) * (P + N * C) + P + jnp.arange(N)[None] * C
    index = (start + jnp.maximum(completion_len, 1) - 1).reshape(R, -1)
    position = jnp.take_along_axis(inputs.packed_index, index, axis=1)
    return jnp.minimum(position, inputs.tokens.shape[1] - 1)
