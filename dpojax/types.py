"""What travels between the floors, and the glossary of shapes.

B pairs (prompts) in a batch    N completions of a prompt (2 in a pair: chosen, rejected)
P prompt tokens                 C completion tokens (EOS included)       S places of a row in the grid, P + N * C
R streams of packed tokens      T tokens in a stream    Z of them scored    G grid places of a stream, B / R * S
V vocabulary    D model width    F MLP width    h head width    f rotary pairs, h / 2
H query heads                   K key/value heads    L layers
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

PyTree: TypeAlias = Any  # parameters: a nested dict of arrays

RESOLUTION = 4e-6
"""Relative difference between two computations of a float32 log-probability that is only rounding (a sum over the
completion, from hidden states; batches of other shapes differ by up to 1e-6)."""


def told_apart(difference: Any, magnitude: Any) -> Any:
    """Where a difference, of JAX's or NumPy's numbers, is more than rounding of numbers of this magnitude."""
    return abs(difference) > RESOLUTION * magnitude


def unchanged(log_ratio: Float[Array, " B"]) -> Float[Array, " B"]:
    """The score of a log-ratio under the reverse KL divergence: itself."""
    return log_ratio


@struct.dataclass
class PairLogps:
    """Log-probabilities of a batch of pairs, all that an objective sees.

    ``chosen`` and ``rejected`` are sums of log p(token | prefix) over the completion's tokens, in nats: its EOS is
    counted, the prompt is not. ``chosen_len`` and ``rejected_len`` count those tokens; a row that only fills up a batch
    has none. The rest is there where an objective declares that it reads it (:mod:`dpojax.losses.traits`), and None
    elsewhere:

    - ``mean_chosen_len``: mean of ``chosen_len`` over the whole batch, of which these pairs may be a part.
    - ``margin``, ``weight``: by how much the chosen side is better, and what the pair counts, as the data says.
    - ``chosen_tokens``, ``rejected_tokens``: log p of every token, 0 beyond a completion's end.
    - ``chosen_squares``, ``rejected_squares``: sums over the tokens of ``log sum_v p(v)^2``, nats.
    - ``chosen_kl``, ``rejected_kl``: sums over the tokens of KL(reference || policy), nats; the policy's alone.
    - ``key``: a random key for every pair.
    - ``running``: by objective, what it keeps over the steps.

    ``divergence`` turns log-ratios into scores (:func:`dpojax.losses.with_divergence`). ``states`` is what the
    reference hands to the policy's pass where distributions are compared; no objective reads it.
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    chosen_len: Int[Array, " B"]
    rejected_len: Int[Array, " B"]
    mean_chosen_len: Float[Array, ""] | None = None
    margin: Float[Array, " B"] | None = None
    weight: Float[Array, " B"] | None = None
    chosen_tokens: Float[Array, "B C"] | None = None
    rejected_tokens: Float[Array, "B C"] | None = None
    chosen_squares: Float[Array, " B"] | None = None
    rejected_squares: Float[Array, " B"] | None = None
    chosen_kl: Float[Array, " B"] | None = None
    rejected_kl: Float[Array, " B"] | None = None
    key: PRNGKeyArray | None = None
    running: dict[str, dict[str, Array]] | None = None
    states: "States | None" = None
    divergence: Callable[[Array], Array] = struct.field(pytree_node=False, default=unchanged)


@struct.dataclass
class States:
    """A model's distributions over the next token, as they leave it: hidden states, and the unembedding matrix."""

    hidden: Float[Array, "R Z D"]
    head: Float[Array, "V D"] | None


@struct.dataclass
class LabelledLogps:
    """Log-probabilities of completions that are each labelled good or bad, for the unpaired objectives.

    ``logps`` are sums over the completion's tokens, as in :class:`PairLogps`, ``lengths`` count those tokens (none in a
    row that only fills up), ``label`` is 1 for a desirable completion and 0 for an undesirable one. ``mismatched`` is
    the log-probability of another prompt's completion, from which KTO estimates the KL divergence.
    """

    logps: Float[Array, " B"]
    lengths: Int[Array, " B"]
    label: Float[Array, " B"]
    mismatched: Float[Array, " B"] | None = None
    running: dict[str, dict[str, Array]] | None = None


@struct.dataclass
class CompletionStats:
    """What one pass over a batch says of its completions: ``sums`` of their tokens' log-probabilities, and the optional
    rest as in :class:`PairLogps`. The arrays may be NumPy's too."""

    sums: Float[Array, "B N"]
    tokens: Float[Array, "B N C"] | None = None
    squares: Float[Array, "B N"] | None = None
    kl: Float[Array, "B N"] | None = None
    states: States | None = None


@struct.dataclass
class PairBatch:
    """Prompts, each with N completions: N = 2 is (chosen, rejected), N = 1 is SFT's one completion.

    Prompts are padded on the left and completions on the right, so every prompt ends, and every completion begins,
    at the same place of its row in the grid ``[B, S]``, S = P + N * C. Lengths, never token ids, say what is padding
    (pad == eos is normal). ``real`` is 1 for a row of the data and 0 for a row that only fills up the last batch.

    What is computed is not the grid but R streams of real tokens, packed without gaps, each of B / R rows:
    ``stream`` names the place in the rows' grid that each of a stream's T slots is taken from, ``scored`` the place
    among the rows' completion tokens that each of its Z log-probabilities is for. A place beyond the end is an empty
    slot. None is the whole grid.

    ``hidden`` is what a frozen trunk has made of the streams' tokens; the layers above it go on from there. ``rank``
    orders a prompt's completions (0 the best; two of one rank are no pair; None: as they stand), ``score`` says by how
    much, ``weight`` what the row counts, ``label`` whether its completion is desirable, as the data has them. ``key``
    is a random key for every row, where the objective draws.
    """

    prompt: Int[Array, "B P"]
    prompt_len: Int[Array, " B"]
    completions: Int[Array, "B N C"]
    completion_len: Int[Array, "B N"]
    real: Float[Array, " B"]
    stream: Int[Array, "R T"] | None = None
    scored: Int[Array, "R Z"] | None = None
    hidden: Float[Array, "R T D"] | None = None
    rank: Int[Array, "B N"] | None = None
    score: Float[Array, "B N"] | None = None
    weight: Float[Array, " B"] | None = None
    label: Float[Array, " B"] | None = None
    key: PRNGKeyArray | None = None


@struct.dataclass
class Rows:
    """What a model reads: streams of tokens, and where in the grid ``[B, S]`` of a :class:`PairBatch` they belong.

    ``places`` and ``slots`` are each other's inverse: slot t of a stream holds the token of grid place ``places[t]``,
    which is found again at ``slots[place]``; an index beyond the end is nothing. Attention is computed on the grid,
    where ``prompt`` and ``completion`` (P and C) say which columns are whose; all else on the streams. ``hidden``,
    where there is any, is read in place of the tokens' embeddings.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    places: Int[Array, "R T"]
    slots: Int[Array, "R G"]
    prompt_len: Int[Array, " B"]
    prompt: int = struct.field(pytree_node=False)
    completion: int = struct.field(pytree_node=False)
    hidden: Float[Array, "R T D"] | None = None


@struct.dataclass
class Metric:
    """A mean that has not been divided yet; micro-batches, devices and hosts add up, and only logging divides."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def mean(self) -> float:
        return float(self.sum) / max(float(self.weight), 1e-30)


@runtime_checkable
class ApplyFn(Protocol):
    """A model as the floors above see it: parameters and rows in, hidden states and unembedding matrix out."""

    def __call__(self, params: PyTree, rows: Rows) -> tuple[Float[Array, "R T D"], Float[Array, "V D"]]: ...


def completion_mask(batch: PairBatch) -> Bool[Array, "B N C"]:
    """True where a completion position holds a real token."""
    C = batch.completions.shape[-1]
    return jax.numpy.arange(C)[None, None, :] < batch.completion_len[:, :, None]
