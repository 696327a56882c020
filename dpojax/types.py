"""What objectives see, and the glossary of shapes.

B pairs (prompts) in a batch    N completions of a prompt (2 in a pair: chosen, rejected)
P prompt tokens                 C completion tokens (EOS included)       S tokens of a padded row, P + N * C
R packed sequences              T tokens of one    Z of them targets    G padded tokens it is from, B / R * S
V vocabulary    D model width    F MLP width    h head width    f rotary pairs
H query heads                   K key/value heads    L layers
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

PyTree: TypeAlias = Any  # parameters: a nested dict of arrays


@struct.dataclass
class Unembedding:
    """Hidden states to logits: ``z = h @ matrix.T + bias``, and ``softcap tanh(z / softcap)`` where there is a cap."""

    matrix: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = struct.field(pytree_node=False, default=None)


Head: TypeAlias = Array | Unembedding
"""An unembedding, or its matrix ``[V, D]`` where that is all of it."""

RESOLUTION = 4e-6
"""Relative difference between two computations of a float32 log-probability that is only rounding (a sum over the
completion, from hidden states; batches of other shapes differ by up to 1e-6)."""


def beyond_rounding(difference: Any, magnitude: Any) -> Any:
    """True where a difference, of JAX's or NumPy's numbers, exceeds the rounding of numbers of this magnitude."""
    return abs(difference) > RESOLUTION * magnitude


def reverse_kl_score(log_ratio: Float[Array, " B"]) -> Float[Array, " B"]:
    """The score of a log-ratio under the reverse KL divergence: the log-ratio itself."""
    return log_ratio


class Sides(NamedTuple):
    """One statistic of both sides of every pair."""

    chosen: Any
    rejected: Any


@struct.dataclass
class PairLogps:
    """Log-probabilities of a batch of pairs, all that an objective sees.

    ``chosen`` and ``rejected`` are sums of log p(token | prefix) over the completion's tokens, in nats: its EOS is
    counted, the prompt is not. ``chosen_len`` and ``rejected_len`` count those tokens; they are 0 in padding rows. The
    other fields are None unless the objective declares that it reads them (:mod:`dpojax.losses.traits`):

    - ``mean_chosen_len``: mean of ``chosen_len`` over the whole batch, of which these pairs may be a micro-batch.
    - ``margin``, ``weight``: by how much the chosen side is better, and how much the pair counts, from the data.
    - ``tokens``: log p of every token, ``[B, C]`` a side, 0 beyond a completion's end.
    - ``squares``: sums over the tokens of ``log sum_v p(v)^2``, nats, ``[B]`` a side.
    - ``kl``: sums over the tokens of KL(reference || policy), nats, ``[B]`` a side; of the policy alone.
    - ``key``: a random key for every pair.
    - ``running``: by objective, its running statistics.

    ``divergence`` maps log-ratios to scores (:func:`dpojax.losses.with_divergence`).
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    chosen_len: Int[Array, " B"]
    rejected_len: Int[Array, " B"]
    mean_chosen_len: Float[Array, ""] | None = None
    margin: Float[Array, " B"] | None = None
    weight: Float[Array, " B"] | None = None
    tokens: Sides | None = None
    squares: Sides | None = None
    kl: Sides | None = None
    key: PRNGKeyArray | None = None
    running: dict[str, dict[str, Array]] | None = None
    divergence: Callable[[Array], Array] = struct.field(pytree_node=False, default=reverse_kl_score)


@struct.dataclass
class LabelledLogps:
    """Log-probabilities of completions that are each labelled good or bad, for the unpaired objectives.

    ``logps`` are sums over the completion's tokens, as in :class:`PairLogps`. ``lengths`` count those tokens; they are
    0 in padding rows. ``label`` is 1 for a desirable completion and 0 for an undesirable one. ``mismatched`` is the
    log-probability of another prompt's completion, from which KTO estimates the KL divergence.
    """

    logps: Float[Array, " B"]
    lengths: Int[Array, " B"]
    label: Float[Array, " B"]
    mismatched: Float[Array, " B"] | None = None
    running: dict[str, dict[str, Array]] | None = None


Logps = PairLogps | LabelledLogps


@struct.dataclass
class CompletionStats:
    """Statistics of every completion of a batch, from one forward pass: ``sums`` of the tokens' log-probabilities, the
    optional statistics as in :class:`PairLogps`, and the ``hidden`` states that predict the targets. Arrays may be
    NumPy's."""

    sums: Float[Array, "B N"]
    tokens: Float[Array, "B N C"] | None = None
    squares: Float[Array, "B N"] | None = None
    kl: Float[Array, "B N"] | None = None
    hidden: Float[Array, "R Z D"] | None = None


STATISTICS = tuple(field.name for field in dataclasses.fields(CompletionStats) if field.name not in ("sums", "hidden"))
"""The optional statistics of completions; each is a field of :class:`PairLogps` too."""

REFERENCE_STATISTICS = frozenset({"tokens"})
"""The statistics that objectives read of the reference too."""

COMPARED_DISTRIBUTIONS = frozenset({"kl"})
"""The statistics of the policy that need the reference's distributions over the whole vocabulary."""


@struct.dataclass
class ReferenceOutput:
    """The reference's log-probabilities of a batch, and where an objective compares whole distributions also its
    hidden states that predict the targets and its unembedding."""

    logps: Logps
    hidden: Float[Array, "R Z D"] | None = None
    head: Head | None = None


@struct.dataclass
class Metric:
    """A mean as sum and weight; micro-batches, devices and hosts add them up, and only logging divides."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def mean(self) -> float:
        return float(self.sum) / max(float(self.weight), 1e-30)
