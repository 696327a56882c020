"""From examples to batches of few shapes; Grain orders, shuffles, batches and remembers the position."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dpojax.data.tokens import Example
from dpojax.packing import Annotations, PairBatch, pack

MULTIPLE = 8  # of streams' lengths, so that the shapes are few from the start
ENOUGH = 0.925  # real tokens among those computed, for which no further shape is compiled

# What a scored token's projection, and a score of attention, cost in units of a token; only to weigh shapes by.
HEAD_COST, SCORE_COST = 0.25, 1 / 4000


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a batch's arrays are padded to; tokens and targets are of a packed sequence."""

    tokens: int  # T
    targets: int  # Z
    prompt: int  # P
    completion: int  # C

    def cover(self, other: "Shape") -> "Shape":
        """The smallest shape that holds both."""
        return Shape(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


@dataclasses.dataclass(frozen=True)
class IndexedBatch:
    """A batch and which example each of its rows is, -1 for a row that only fills up."""

    index: np.ndarray  # [B]
    batch: PairBatch


def completion_lengths(examples: Sequence[Example]) -> np.ndarray:
    """``[n, N]`` completion tokens; 0 where an example has fewer completions than others."""
    most = max(len(example.completions) for example in examples)
    rows = [[len(completion) for completion in example.completions] for example in examples]
    return np.array([row + [0] * (most - len(row)) for row in rows], np.int32)


def annotations_of(examples: Sequence[Example | None], N: int) -> Annotations:
    """What the rows say of their completions, as arrays."""
    B = len(examples)
    values = {"rank": np.zeros((B, N), np.int32), "score": np.zeros((B, N), np.float32)}
    values |= {name: np.zeros((B,), np.float32) for name in ("weight", "label")}
    for i, example in enumerate(examples):
        if example is not None:
            said = example.values
            ranks = said.ranks or range(len(example.completions))
            values["rank"][i, : len(ranks)], values["score"][i, : len(said.scores)] = ranks, said.scores
            values["weight"][i], values["label"][i] = said.weight, said.label
    return Annotations(**values)  # type: ignore[arg-type]


def without_tokens(examples: Sequence[Example]) -> PairBatch:
    """All examples side by side, with their lengths and annotations and none of their tokens."""
    lengths = completion_lengths(examples)
    n, N = lengths.shape
    padded: Any = np.zeros((n, 0), np.int32), np.zeros((n,), np.int32), np.zeros((n, N, 0), np.int32), lengths
    return PairBatch(*padded, np.ones((n,), np.float32), annotations=annotations_of(examples, N))  # type: ignore[arg-type]


def collate(
    examples: Sequence[Example | None], shape: Shape, sequences: int = 1, completions_each: int | None = None
) -> PairBatch:
    """Examples side by side, padded to ``shape``; None is a row that only fills up.

    ``completions_each`` is N, where it is more than these examples have.
    """
    P, C = shape.prompt, shape.completion
    there = [example for example in examples if example is not None]
    B, N = len(examples), completions_each or max(len(example.completions) for example in there)
    prompt, completions = np.zeros((B, P), np.int32), np.zeros((B, N, C), np.int32)
    prompt_len, completion_len = np.zeros((B,), np.int32), np.zeros((B, N), np.int32)
    for i, example in enumerate(examples):
        if example is None:
            continue
        prompt_len[i] = len(example.prompt)
        prompt[i, P - prompt_len[i] :] = example.prompt
        for n, completion in enumerate(example.completions):
            completion_len[i, n] = len(completion)
            completions[i, n, : len(completion)] = completion
    valid = np.array([example is not None for example in examples], np.float32)
    packing = pack(prompt_len, completion_len, P, C, sequences, shape.tokens, shape.targets)
    padded: Any = (prompt, prompt_len, completions, completion_len, valid)
    return PairBatch(*padded, packing, annotations_of(examples, N))


def plan_shapes(
    needs: Sequence[Shape], max_shapes: int, cost: Callable[[Shape], float], real: float = 0.0
) -> list[Shape]:
    """Shapes that cover the batches' needs, smallest first.

    Needs are ordered by cost and cut into runs, each run covered by one shape; the cuts are the best there are
    (dynamic programming). There are as few as make ``real`` at least ENOUGH of all that is computed, at most
    ``max_shapes``. Deterministic, so that a resumed run plans as it did before.
    """
    counts = collections.Counter(needs)
    groups = sorted(counts, key=lambda s: (cost(s), dataclasses.astuple(s)))
    weights = [counts[shape] for shape in groups]
    while len(groups) > 96:  # so many needs differ by little: neighbours are one
        pairs = range(0, len(groups), 2)
        weights = [sum(weights[i : i + 2]) for i in pairs]
        groups = [functools.reduce(Shape.cover, groups[i : i + 2]) for i in pairs]

    n = len(groups)
    cover = [[groups[i]] for i in range(n)]  # cover[i][j]: of the groups from i to i + j
    for i, row in enumerate(cover):
        for j in range(i + 1, n):
            row.append(row[-1].cover(groups[j]))
    before = np.concatenate([[0], np.cumsum(weights)])
    price = [
        [cost(shape) * (before[i + j + 1] - before[i]) for j, shape in enumerate(row)] for i, row in enumerate(cover)
    ]

    best: list[tuple[float, list[Shape]]] = [(0.0, []), *[(np.inf, [])] * n]  # of the first j groups, with k shapes
    for _ in range(min(max_shapes, n)):
        ends = [min((best[i][0] + price[i][j - i - 1], i) for i in range(j)) for j in range(1, n + 1)]
        best = [(np.inf, []), *((c, [*best[i][1], cover[i][j - i]]) for j, (c, i) in enumerate(ends))]
        if real >= ENOUGH * sum(min(s.tokens for s in best[n][1] if s.cover(need) == s) for need in needs):
            break
    return best[n][1]


class Batches:
    """All batches of a pass or of a run, in order.

    Args:
      examples: what to batch.
      batch_size: rows a batch.
      max_shapes: shapes at most; fewer, where they keep padding low.
      sequences: packed sequences a batch: the devices that split it, times the micro-batches.
      seed: shuffle, each epoch anew; None keeps similar lengths together instead, for passes whose order is free.
      epochs: passes over the examples. Batches run on over an epoch's end; only the very last may be part filled.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        max_shapes: int,
        sequences: int = 1,
        seed: int | None = None,
        epochs: int = 1,
    ):
        self.examples, self.batch_size, self.sequences = examples, batch_size, sequences
        self.hidden: Callable[[int], np.ndarray] | None = None
        self.prompts = np.array([len(e.prompt) for e in examples])
        self.completions = completion_lengths(examples)
        self.tokens = self.prompts + self.completions.sum(axis=1)
        if seed is None:
            indices = grain.MapDataset.source(self._even_order(max_shapes))
        else:
            indices = grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat(epochs)
        self.indices = indices.batch(batch_size)
        needs = [self._need(self._rows(self.indices[i])) for i in range(len(self.indices))]
        real = sum(int(self.tokens[self.indices[i]].sum()) for i in range(len(self.indices)))
        self.shapes = plan_shapes(needs, max_shapes, self._cost, real / sequences)
        self.valid_share = real / sum(self._fit(need).tokens * sequences for need in needs)
        """Real tokens among those computed."""

    def __len__(self) -> int:
        return len(self.indices)

    def sentence(self) -> str:
        """How the batches are packed, for the console."""
        shapes = f"{len(self.shapes)} shape{'s' * (len(self.shapes) > 1)}"
        return (
            f"{len(self)} batches of {self.batch_size} in {shapes}; {self.valid_share:.1%} of tokens computed are real"
        )

    def _cost(self, shape: Shape) -> float:
        rows, N = self.batch_size // self.sequences, self.completions.shape[1]
        scores = shape.prompt**2 + N * shape.completion * (shape.prompt + shape.completion)
        return shape.tokens + HEAD_COST * shape.targets + SCORE_COST * rows * scores

    def _even_order(self, groups: int) -> list[int]:
        """Longest first, in groups of whole batches; within a group, batches are dealt like numbers of tokens."""
        ordered = sorted(range(len(self.examples)), key=lambda i: (-int(self.tokens[i]), i))
        batches = -(-len(ordered) // self.batch_size)
        size = -(-batches // groups) * self.batch_size
        order = []
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            deal = max(1, len(group) // self.batch_size)
            whole = [i for first in range(deal) for i in group[first : deal * self.batch_size : deal]]
            order += whole + group[deal * self.batch_size :]
        return order

    def _rows(self, index: np.ndarray) -> np.ndarray:
        """A batch's examples in the order of its rows, -1 where there is none: streams of like numbers of tokens."""
        rows = np.full((self.sequences, self.batch_size // self.sequences), -1)
        if self.sequences == 1:
            rows[0, : len(index)] = index
            return rows[0]
        held, load = np.zeros(self.sequences, int), np.zeros(self.sequences, int)
        for i in sorted(index, key=lambda i: (-int(self.tokens[i]), i)):  # the longest first, to the emptiest
            stream = int(np.argmin(np.where(held < rows.shape[1], load, np.iinfo(int).max)))
            rows[stream, held[stream]] = i
            held[stream] += 1
            load[stream] += self.tokens[i]
        return rows.reshape(-1)

    def _need(self, rows: np.ndarray) -> Shape:
        real = (rows >= 0).reshape(self.sequences, -1)

        def most(lengths: np.ndarray) -> int:
            total = int(np.where(real, lengths[rows].reshape(real.shape), 0).sum(axis=1).max())
            return -(-total // MULTIPLE) * MULTIPLE

        kept = rows[rows >= 0]
        even = lambda lengths: -(-int(lengths[kept].max()) // 2) * 2  # noqa: E731  # as cuDNN's attention wants them
        prompt, completion = even(self.prompts), even(self.completions)
        return Shape(most(self.tokens), most(self.completions.sum(axis=1)), prompt, completion)

    def _fit(self, need: Shape) -> Shape:
        return min((s for s in self.shapes if s.cover(need) == s), key=self._cost)

    def collate(self, index: np.ndarray) -> IndexedBatch:
        """The examples of these indices, in the smallest planned shape that holds them."""
        rows = self._rows(index)
        examples = [self.examples[i] if i >= 0 else None for i in rows]
        shape = self._fit(self._need(rows))
        batch = collate(examples, shape, self.sequences, self.completions.shape[1])
        if self.hidden is not None:
            first = self.hidden(int(index[0]))
            hidden = np.zeros((self.sequences, shape.tokens, first.shape[1]), first.dtype)
            for i, stream, slots in self.spans(rows):
                hidden[stream, slots] = self.hidden(i)
            batch = dataclasses.replace(batch, hidden=hidden)  # type: ignore[arg-type]
        return IndexedBatch(rows, batch)

    def spans(self, rows: np.ndarray) -> Iterator[tuple[int, int, slice]]:
        """Every example of a batch's rows, its stream and its slots there; :func:`pack` leaves no gap."""
        for stream, held in enumerate(rows.reshape(self.sequences, -1)):
            at = 0
            for i in held[held >= 0]:
                yield int(i), stream, slice(at, at + int(self.tokens[i]))
                at += int(self.tokens[i])

    def carrying(self, hidden: Callable[[int], np.ndarray]) -> "Batches":
        """The same batches, with their examples' hidden states: ``hidden(i)`` is ``[tokens, D]``."""
        batches = copy.copy(self)
        batches.hidden = hidden
        return batches

    def first_pass(self, limit: int | None = None) -> int:
        """Of the first ``limit`` batches (default: all), those that can hold an example that none before them held."""
        return min(limit or len(self), len(self), -(-len(self.examples) // self.batch_size))

    def iterator(self) -> grain.DatasetIterator[IndexedBatch]:
        """Iterates from the first batch; its ``get_state`` and ``set_state`` remember and restore the position."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self.indices.map(self.collate).to_iter_dataset(options))

    def __iter__(self) -> Iterator[IndexedBatch]:
        return self.iterator()
