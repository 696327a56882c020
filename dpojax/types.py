"""What travels between the floors, and the glossary of shapes.

B pairs (prompts) in a batch    N completions of a prompt (2 in a pair: chosen, rejected)
P prompt tokens                 C completion tokens (EOS included)       T tokens in a row, P + N * C
V vocabulary    D model width    F MLP width    h head width    f rotary pairs, h / 2
H query heads                   K key/value heads    L layers
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

PyTree: TypeAlias = Any  # parameters: a nested dict of arrays


@struct.dataclass
class PairLogps:
    """Log-probabilities of a batch of pairs, all that an objective sees.

    ``chosen`` and ``rejected`` are sums of log p(token | prefix) over the completion's tokens, in nats: its EOS is
    counted, the prompt is not. ``chosen_len`` and ``rejected_len`` count those tokens. ``mean_chosen_len`` is the mean
    of ``chosen_len`` over the whole batch where these pairs are only a part of it, so that micro-batches agree.
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    chosen_len: Int[Array, " B"]
    rejected_len: Int[Array, " B"]
    mean_chosen_len: Float[Array, ""] | None = None


@struct.dataclass
class PairBatch:
    """Prompts, each with N completions side by side: N = 2 is (chosen, rejected), N = 1 is SFT's one completion.

    Prompts are padded on the left and completions on the right, so every prompt ends, and every completion begins,
    at the same place in the row. Lengths, never token ids, say what is padding (pad == eos is normal).
    ``real`` is 1 for a row of the data and 0 for a row that only fills up the last batch.
    """

    prompt: Int[Array, "B P"]
    prompt_len: Int[Array, " B"]
    completions: Int[Array, "B N C"]
    completion_len: Int[Array, "B N"]
    real: Float[Array, " B"]


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
    """A model as the floors above see it: parameters and rows in, hidden states and unembedding matrix out.

    ``segments`` says who sees whom: -1 is padding, 0 the prompt, n >= 1 the n-th completion. A token attends to
    earlier tokens of the prompt and of its own segment.
    """

    def __call__(
        self,
        params: PyTree,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]: ...


def completion_mask(batch: PairBatch) -> Bool[Array, "B N C"]:
    """True where a completion position holds a real token."""
    C = batch.completions.shape[-1]
    return jax.numpy.arange(C)[None, None, :] < batch.completion_len[:, :, None]
