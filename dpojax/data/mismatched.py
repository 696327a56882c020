"""Completions of other prompts, from which KTO estimates its KL divergence."""

from typing import Any

import numpy as np

from dpojax.data.examples import Example, Examples
from dpojax.data.tokens import hashed
from dpojax.errors import UserError


class Mismatched(Examples):
    """Labelled examples, each with the completion of another one after its own.

    Attributes:
      inner: the examples.
      other: ``[n]``, whose completion it is.
    """

    inner: Examples
    other: np.ndarray

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        example, n = super().__getitem__(index), int(self.completion_len[index, 1])
        theirs = self.inner[int(self.other[index])]
        masks = (*example.masks, *[mask[:n] for mask in theirs.masks]) if example.masks and theirs.masks else ()
        return Example(example.prompt, (*example.completions, theirs.completions[0][:n]), example.annotations, masks)

    def select(self, index: np.ndarray) -> "Mismatched":
        """The examples of these indices, in their order."""
        out: Any = super().select(index)
        out.other = self.other[index]
        return out

    @property
    def keys(self) -> np.ndarray:
        """``[n]``, a hash of every example's tokens, and of the other completion's."""
        keys, theirs = super().keys, self.inner.keys[self.other]
        both = zip(keys, theirs, self.completion_len[:, 1], strict=True)
        return np.array([hashed(np.array([a, b, n], np.uint64)) for a, b, n in both], np.uint64)


def with_mismatched(examples: Examples, max_length: int) -> Mismatched:
    """Labelled examples, each with the completion of another prompt after its own.

    The other completion is that of the last example before it, counted round the end, whose prompt is different, as in
    TRL. It is cut to ``max_length`` together with this example's prompt.

    Raises:
      UserError: all prompts are equal.
    """
    prompts = examples.prompts
    if (prompts == prompts[0]).all():
        raise UserError("the objective compares completions of different prompts, and the data has one; see --loss bco")
    changes = np.concatenate([[False], prompts[1:] != prompts[:-1]])
    last = np.maximum.accumulate(np.where(changes, np.arange(len(prompts)) - 1, -1))  # of another prompt, before it
    other = np.where(last < 0, np.flatnonzero(prompts != prompts[0])[-1], last)
    out = Mismatched.__new__(Mismatched)
    out.__dict__.update(vars(examples))
    room = np.maximum(1, max_length - examples.prompt_len)
    mine = examples.completion_len[:, 0]
    out.completion_len = np.stack([mine, np.minimum(mine[other], room)], axis=1)
    out.inner, out.other = examples, other
    return out
