"""Examples: rows in tokens, cut to a length, read from flat arrays one at a time."""

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from dpojax.data.dialogue import Notes, RowAnnotations, RowKind
from dpojax.data.encode import TokenizedRow
from dpojax.data.tokens import FILL, Tokens, annotations_at, hashed, tokens_of, widened

ANNOTATIONS = ("ranks", "scores", "margin", "weight", "label")


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens: its prompt, its completions, the best first, and its annotations.

    ``masks`` say of every completion's tokens which are trained on; it is empty where all are.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    annotations: RowAnnotations = RowAnnotations()  # noqa: RUF009  # frozen
    masks: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many tokens are kept of rows' prompts, from their end, and of their completions, from their beginning.

    ``prompt`` is ``[n]``, ``completions`` ``[n, N]``.
    """

    prompt: np.ndarray
    completions: np.ndarray


def cut_to(lengths: np.ndarray, max_length: int, min_prompt_length: int) -> Cut:
    """What ``max_length`` tokens leave of rows with these lengths of prompt and completions, ``[n, 1 + N]``.

    The prompt loses its start first, down to ``min_prompt_length`` tokens but never to less than half of
    ``max_length``; then every completion loses its end at the same length.
    """
    prompt, completions = lengths[:, 0], lengths[:, 1:]
    longest = completions.max(axis=1, initial=0)
    floor = min(min_prompt_length, max(1, max_length // 2))
    kept = np.minimum(prompt, np.maximum(floor, max_length - longest))
    return Cut(kept, np.minimum(completions, (max_length - kept)[:, None]))


def truncate(
    prompt: Sequence[int] | np.ndarray,
    completions: Sequence[Sequence[int] | np.ndarray],
    max_length: int,
    min_prompt_length: int = 1,
) -> tuple[Example, bool, bool]:
    """One row cut as :func:`cut_to` says.

    Returns:
      The example, whether its prompt was cut, and whether a completion was.
    """
    lengths = np.array([[len(prompt), *map(len, completions)]])
    cut = cut_to(lengths, max_length, min_prompt_length)
    kept, ends = int(cut.prompt[0]), cut.completions[0].tolist()
    sides = zip(completions, ends, strict=True)
    example = Example(
        np.asarray(prompt[len(prompt) - kept :], np.int32),
        tuple([np.asarray(completion[:end], np.int32) for completion, end in sides]),
    )
    return example, kept < len(prompt), bool((cut.completions < lengths[:, 1:]).any())


class Examples(Sequence[Example]):
    """Rows of one or several files, in tokens and cut to a length; each is read when it is asked for.

    Attributes:
      sources: the tokens that the rows are of.
      source, row: ``[n]``, which of them, and which of its rows.
      part: ``[n]``, which part of a mixture; None where every example counts once.
      weights: of the parts of a mixture.
      prompt_len: ``[n]`` tokens kept of the prompt.
      completion_len: ``[n, N]`` tokens kept of the completions; 0 where a row has fewer than others.
      kind: the annotations that are read.
    """

    def __init__(self, sources: Sequence[Tokens], source: np.ndarray, row: np.ndarray, cut: Cut, kind: RowKind | None):
        self.part: np.ndarray | None = None
        self.weights: tuple[float, ...] = ()
        self.sources, self.source, self.row, self.kind = list(sources), source, row, kind
        self.prompt_len, self.completion_len = cut.prompt.astype(np.int32), cut.completions.astype(np.int32)
        self.starts = [tokens.starts for tokens in self.sources]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """The same examples as flat arrays; themselves if they are."""
        if isinstance(examples, Examples):
            return examples
        rows = [
            TokenizedRow(i, (e.prompt, *e.completions), e.masks, 0, hashed(e.prompt), Notes(e.annotations))
            for i, e in enumerate(examples)
        ]
        tokens = tokens_of(rows)
        cut = Cut(tokens.lengths[:, 0], tokens.lengths[:, 1:])
        return cls([tokens], np.zeros(len(rows), np.int32), np.arange(len(rows)), cut, None)

    @classmethod
    def of_tokens(
        cls,
        sources: Sequence[Tokens],
        rows: Sequence[np.ndarray],
        cuts: Sequence[Cut],
        kind: RowKind,
        part: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> "Examples":
        """Some rows of sources, cut, in the order of the sources; ``part`` says of each source which of ``weights`` is
        its own."""
        each = [len(some) for some in rows]
        cut = Cut(
            np.concatenate([cut.prompt for cut in cuts]),
            np.concatenate(widened([cut.completions for cut in cuts], 0)),
        )
        source = np.repeat(np.arange(len(sources), dtype=np.int32), each)
        out = cls(sources, source, np.concatenate(rows), cut, kind)
        if weights:
            out.part, out.weights = np.repeat(np.array(part, np.int32), each), tuple(weights)
        return out

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        tokens = self.sources[self.source[index]]
        row, kept, ends = int(self.row[index]), int(self.prompt_len[index]), self.completion_len[index].tolist()
        lengths = tokens.lengths[row].tolist()
        at = int(self.starts[self.source[index]][row]) + lengths[0]
        prompt, completions, masks = tokens.flat[at - kept : at], [], []
        for length, end in zip(lengths[1:], ends, strict=False):
            if length:
                completions.append(np.asarray(tokens.flat[at : at + end], np.int32))
                if tokens.masks is not None:
                    masks.append(np.asarray(tokens.masks[at : at + end]))
            at += length
        return Example(np.asarray(prompt, np.int32), tuple(completions), self._annotations(tokens, row), tuple(masks))

    def _annotations(self, tokens: Tokens, row: int) -> RowAnnotations:
        notes = annotations_at(tokens, row)
        return notes.annotations if self.kind is None else notes.of_kind(self.kind)

    def select(self, index: np.ndarray) -> "Examples":
        """The examples of these indices, in their order."""
        out = copy.copy(self)
        for name in ("source", "row", "prompt_len", "completion_len", "part"):
            if getattr(self, name) is not None:
                setattr(out, name, getattr(self, name)[index])
        return out

    def gathered(self, name: str) -> np.ndarray:
        """A field of :class:`~dpojax.data.tokens.Tokens` of all examples, filled up to the widest source's N."""
        parts = [np.asarray(getattr(x, name)[self.row[self.source == i]]) for i, x in enumerate(self.sources)]
        if len(parts) == 1:
            return parts[0]
        if name in FILL:
            parts = widened(parts, FILL[name])
        order = np.argsort(np.concatenate([np.flatnonzero(self.source == i) for i in range(len(parts))]))
        return np.concatenate(parts)[order]

    @property
    def reads(self) -> tuple[str, ...]:
        """The annotations that some example has, of those that are read."""
        unread = () if self.kind is None else [n for n in ("margin", "weight") if not getattr(self.kind, n)]
        have = lambda x: (x >= 0).any() if x.dtype.kind == "i" else np.isfinite(x).any()  # noqa: E731
        return tuple([name for name in ANNOTATIONS if name not in unread and have(self.gathered(name))])

    @property
    def prompts(self) -> np.ndarray:
        """``[n]``, a hash of every prompt, before it was cut."""
        return self.gathered("prompts")

    @property
    def keys(self) -> np.ndarray:
        """``[n]``, a hash of every example's tokens and masks."""
        keys = self.gathered("keys")
        kept = np.concatenate([self.prompt_len[:, None], self.completion_len], axis=1)
        for i in np.flatnonzero(self.is_cut):
            keys[i] = hashed(keys[i : i + 1], kept[i])
        return keys

    @property
    def is_cut(self) -> np.ndarray:
        """``[n]``, whether something was cut of an example."""
        lengths = self.gathered("lengths")
        return (lengths[:, 0] > self.prompt_len) | (lengths[:, 1:] > self.completion_len).any(axis=1)

    @property
    def masked(self) -> bool:
        """Whether some completion has tokens that are not trained on."""
        return any(tokens.masks is not None for tokens in self.sources)

    @property
    def top(self) -> int:
        """The largest token id of the files that the examples are of."""
        return max(tokens.top for tokens in self.sources)

    @property
    def content_hash(self) -> str:
        """A hash of all examples, in their order, with the annotations that are read."""
        digest = hashlib.blake2b(self.keys.tobytes(), digest_size=16)
        for name in self.reads:
            digest.update(name.encode() + self.gathered(name).tobytes())
        return digest.hexdigest()
