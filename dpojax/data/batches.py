"""Examples -> batches of few shapes. Grain orders, shuffles, batches and keeps the position."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dpojax.data.examples import Example, Examples
from dpojax.packing import Annotations, PairBatch, pack

MULTIPLE = 8  # of packed sequences' lengths, so that the shapes are few from the start
ENOUGH = 0.925  # real tokens among those computed, for which no further shape is compiled
PLANNED = 4096  # batches that shapes are planned for; looking at millions would delay the first step

FIELD_OF = {"ranks": "rank", "scores": "score", "margin": "score", "weight": "weight", "label": "label"}
"""The batch's annotation that a row's becomes."""

PADDED = 1.05  # computed positions of padded rows, in units of packed ones, up to which rows stay padded

# The cost of a target's projection, and of one attention score, in units of a token; only to weigh shapes by.
TARGET_COST, ATTENTION_COST = 0.25, 1 / 4000


@dataclasses.dataclass(frozen=True)
class Shape:
    """The lengths that a batch's arrays are padded to; tokens and targets are of a packed sequence."""

    tokens: int  # T
    targets: int  # Z
    prompt: int  # P
    completion: int  # C

    def cover(self, other: "Shape") -> "Shape":
        """The smallest shape that holds both."""
        return Shape(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def stays_padded(shape: Shape, rows: int, completions: int) -> bool:
    """Whether rows stay as they are padded: each is a sequence by itself, and is hardly longer than when it is packed.
    Attention reads padded rows, so they need not be moved to it and back.

    Args:
      shape: of the batch.
      rows: of a packed sequence.
      completions: N, of a row.
    """
    return rows == 1 and shape.prompt + completions * shape.completion <= PADDED * shape.tokens


@dataclasses.dataclass(frozen=True)
class IndexedBatch:
    """A global batch's examples, and of its rows those that this process's devices hold.

    Attributes:
      index: ``[B]``, the example in each row of the global batch; -1 for a padding row.
      batch: the rows that this process holds, which are all of them where it is alone.
      held: their examples, as ``index`` has them.
      tokens: real tokens of the global batch, each prompt once.
      computed: packed positions of the global batch, padding included.
    """

    index: np.ndarray
    batch: PairBatch
    held: np.ndarray
    tokens: int
    computed: int


def target_lengths(examples: Examples) -> np.ndarray:
    """``[n, N]`` completion tokens that are trained on; 0 where an example has fewer completions than others."""
    if not examples.masked:
        return examples.completion_len
    out = examples.completion_len.copy()
    for i, example in enumerate(examples):
        out[i, : len(example.masks)] = [mask.sum() for mask in example.masks]
    return out


def annotation_fields(examples: Examples) -> frozenset[str]:
    """The fields of :class:`~dpojax.packing.Annotations` that some example has values for."""
    return frozenset({FIELD_OF[name] for name in examples.reads})


def annotations_of(examples: Sequence[Example | None], N: int, fields: Iterable[str]) -> Annotations:
    """The examples' annotations as arrays: of these fields, None in others.

    A pair's margin m becomes the scores (m, 0), of which only the difference is used. An example without ranks has its
    completions in order, one without weight counts 1; a padding row is all 0.
    """
    B = len(examples)
    empty = {"rank": np.zeros((B, N), np.int32), "score": np.zeros((B, N), np.float32)}
    empty |= {name: np.zeros((B,), np.float32) for name in ("weight", "label")}
    for i, example in enumerate(examples):
        if example is not None:
            notes = example.annotations
            ranks = notes.ranks or range(len(example.completions))
            scores = notes.scores if notes.margin is None else (notes.margin, 0.0)
            empty["rank"][i, : len(ranks)], empty["score"][i, : len(scores)] = ranks, scores
            empty["weight"][i] = 1.0 if notes.weight is None else notes.weight
            empty["label"][i] = 1.0 if notes.label is None else notes.label
    return Annotations(**{name: empty[name] for name in fields})  # type: ignore[arg-type]


def lengths_only(examples: Sequence[Example]) -> PairBatch:
    """All examples as one batch that has their lengths and annotations, and none of their tokens."""
    examples = Examples.of(examples)
    n, N = examples.completion_len.shape
    annotations = annotations_of(list(examples) if examples.reads else [], N, annotation_fields(examples))
    arrays: Any = {
        "prompt": np.zeros((n, 0), np.int32),
        "prompt_len": np.zeros((n,), np.int32),
        "completions": np.zeros((n, N, 0), np.int32),
        "completion_len": target_lengths(examples),
        "valid": np.ones((n,), np.float32),
    }
    return PairBatch(**arrays, annotations=annotations)


def collate(
    examples: Sequence[Example | None],
    shape: Shape,
    sequences: int = 1,
    completions_each: int | None = None,
    fields: Iterable[str] | None = None,
    masked: bool | None = None,
    *,
    packed: bool = True,
) -> PairBatch:
    """A batch of these examples, padded to ``shape``, and packed unless ``packed`` is off; None becomes a padding row.

    ``completions_each`` is N, where it is more than these examples have. ``fields`` are those of the annotations, and
    ``masked`` says whether there is a loss mask (default: those, and if, these examples have).
    """
    P, C = shape.prompt, shape.completion
    there = [example for example in examples if example is not None]
    B, N = len(examples), completions_each or max(len(example.completions) for example in there)
    arrays: Any = {
        "prompt": np.zeros((B, P), np.int32),
        "prompt_len": np.zeros((B,), np.int32),
        "completions": np.zeros((B, N, C), np.int32),
        "completion_len": np.zeros((B, N), np.int32),
        "valid": np.array([example is not None for example in examples], np.float32),
    }
    masked = any(example.masks for example in there) if masked is None else masked
    loss_mask = np.ones((B, N, C), bool) if masked else None
    for i, example in enumerate(examples):
        if example is None:
            continue
        arrays["prompt_len"][i] = len(example.prompt)
        arrays["prompt"][i, P - len(example.prompt) :] = example.prompt
        for n, completion in enumerate(example.completions):
            arrays["completion_len"][i, n] = len(completion)
            arrays["completions"][i, n, : len(completion)] = completion
            if loss_mask is not None and example.masks:
                loss_mask[i, n, : len(completion)] = example.masks[n]
    lengths = arrays["prompt_len"], arrays["completion_len"]
    packing = pack(*lengths, P, C, sequences, shape.tokens, shape.targets, loss_mask) if packed else None
    fields = annotation_fields(Examples.of(there)) if fields is None else fields
    annotations = annotations_of(examples, N, fields)
    return PairBatch(**arrays, packing=packing, annotations=annotations, loss_mask=loss_mask)  # type: ignore[arg-type]


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


def _drawn(examples: Examples, seed: int, epochs: int) -> grain.MapDataset:
    """The indices of examples in the order of a run."""
    n = len(examples)
    if examples.part is None:
        return grain.MapDataset.range(n).shuffle(seed=seed).repeat(epochs)
    there = [np.flatnonzero(examples.part == k) for k in range(len(examples.weights))]
    used = [(rows, weight) for rows, weight in zip(there, examples.weights, strict=True) if len(rows)]
    # Each part is passed through often enough for the draws that are its share.
    share = [weight / sum(weight for _, weight in used) for _, weight in used]
    passes = [int(x * n * epochs / len(rows)) + 2 for x, (rows, _) in zip(share, used, strict=True)]
    parts = [
        grain.MapDataset.source(rows).shuffle(seed=seed).repeat(k) for (rows, _), k in zip(used, passes, strict=True)
    ]
    return grain.MapDataset.mix(parts, weights=share)[: n * epochs]


class Batches:
    """The global batches of a pass or of a run, in order.

    Args:
      examples: the data in tokens.
      batch_size: global batch size, in examples.
      max_shapes: shapes at most; fewer, where they keep padding low.
      sequences: R, packed sequences of a global batch: the devices that split it, times the micro-batches.
      held: those of them that this process holds (:func:`~dpojax.sharding.held_sequences`), in order; default: all.
      seed: shuffle, each epoch anew; None keeps similar lengths together instead, for passes whose order is free.
      epochs: passes over the examples. Batches run on over an epoch's end; only the very last may have padding rows. Of
        a mixture, an epoch has as many draws as there are examples, and each part is passed through by itself.

    Attributes:
      prompts: ``[n]`` prompt tokens of every example.
      completions: ``[n, N]`` completion tokens.
      targets: ``[n]`` tokens of all completions.
      tokens: ``[n]`` all tokens.
      indices: the examples of every batch, by their index.
      shapes: those that batches are padded to.
      valid_share: real tokens among those computed.
      fields: the annotations that every batch has.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        max_shapes: int = 8,
        sequences: int = 1,
        held: Sequence[int] | None = None,
        seed: int | None = None,
        epochs: int = 1,
    ):
        self.held = list(range(sequences)) if held is None else list(held)
        self.examples, self.batch_size, self.sequences = Examples.of(examples), batch_size, sequences
        self.hidden: Callable[[int], np.ndarray] | None = None
        self.prompts, self.completions = self.examples.prompt_len, self.examples.completion_len
        self.targets = self.completions.sum(axis=1, dtype=np.int32)
        self.tokens = self.prompts + self.targets
        self.fields = annotation_fields(self.examples)
        if seed is None:
            indices = grain.MapDataset.source(self._by_length(max_shapes))
        else:
            indices = _drawn(self.examples, seed, epochs)
        self.indices = indices.batch(batch_size)
        looked_at = self._looked_at()
        needs = [self._need(self._placed(self.indices[i])) for i in looked_at]
        real = sum(int(self.tokens[self.indices[i]].sum()) for i in looked_at)
        self.shapes = plan_shapes(needs, max_shapes, self._cost, real / sequences)
        if len(looked_at) < len(self.indices):
            self.shapes.append(self._largest())
        self.valid_share = real / sum(self._fit(need).tokens * sequences for need in needs)

    def __len__(self) -> int:
        return len(self.indices)

    def sentence(self) -> str:
        """Batches, shapes and padding in one line, for the console."""
        shapes = f"{len(self.shapes)} shape{'s' * (len(self.shapes) > 1)}"
        return (
            f"{len(self)} batches of {self.batch_size} in {shapes}; {self.valid_share:.1%} of tokens computed are real"
        )

    def _cost(self, shape: Shape) -> float:
        each, N = self.batch_size // self.sequences, self.completions.shape[1]
        scores = shape.prompt**2 + N * shape.completion * (shape.prompt + shape.completion)
        return shape.tokens + TARGET_COST * shape.targets + ATTENTION_COST * each * scores

    def _looked_at(self) -> np.ndarray:
        """The batches that shapes are planned for: all, or of very many some, evenly spread."""
        n = len(self.indices)
        return np.arange(n) if n <= PLANNED else np.linspace(0, n - 1, PLANNED).astype(int)

    def _largest(self) -> Shape:
        """A shape that holds any batch of these examples."""
        each = self.batch_size // self.sequences
        # Sequences are filled so that none holds more than its examples' share of the longest ones.
        most = lambda lengths: int(np.sort(lengths)[-each:].sum(dtype=np.int64))  # noqa: E731
        up = lambda n, multiple: -(-n // multiple) * multiple  # noqa: E731
        longest = int(self.prompts.max()), int(self.completions.max())
        return Shape(up(most(self.tokens), MULTIPLE), up(most(self.targets), MULTIPLE), *(up(n, 2) for n in longest))

    def _by_length(self, groups: int) -> list[int]:
        """All examples, longest first, in groups of whole batches; the batches of a group have like token counts."""
        ordered = np.argsort(-self.tokens, kind="stable").tolist()
        batches = -(-len(ordered) // self.batch_size)
        size = -(-batches // groups) * self.batch_size
        order = []
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            stride = max(1, len(group) // self.batch_size)
            whole = [i for first in range(stride) for i in group[first : stride * self.batch_size : stride]]
            order += whole + group[stride * self.batch_size :]
        return order

    def _placed(self, index: np.ndarray) -> np.ndarray:
        """A batch's examples in the order of its rows, -1 in padding rows; packed sequences have like token counts."""
        placed = np.full((self.sequences, self.batch_size // self.sequences), -1)
        if self.sequences == 1:
            placed[0, : len(index)] = index
            return placed[0]
        count, load = np.zeros(self.sequences, int), np.zeros(self.sequences, int)
        for i in sorted(index, key=lambda i: (-int(self.tokens[i]), i)):  # the longest first, to the emptiest sequence
            sequence = int(np.argmin(np.where(count < placed.shape[1], load, np.iinfo(int).max)))
            placed[sequence, count[sequence]] = i
            count[sequence] += 1
            load[sequence] += self.tokens[i]
        return placed.reshape(-1)

    def _need(self, placed: np.ndarray) -> Shape:
        """The smallest shape that holds these examples."""
        valid = (placed >= 0).reshape(self.sequences, -1)

        def longest(lengths: np.ndarray) -> int:
            total = int(np.where(valid, lengths[placed].reshape(valid.shape), 0).sum(axis=1).max())
            return -(-total // MULTIPLE) * MULTIPLE

        kept = placed[placed >= 0]
        even = lambda lengths: -(-int(lengths[kept].max()) // 2) * 2  # noqa: E731  # as cuDNN's attention wants them
        prompt, completion = even(self.prompts), even(self.completions)
        return Shape(longest(self.tokens), longest(self.targets), prompt, completion)

    def _fit(self, need: Shape) -> Shape:
        return min((s for s in self.shapes if s.cover(need) == s), key=self._cost)

    def collate(self, index: np.ndarray, always_packed: bool = False) -> IndexedBatch:
        """The batch of these examples, in the smallest planned shape that holds them.

        Lengths alone say where each example goes, so every process reads the tokens of its own rows only. A batch
        without hidden states stays padded where packing saves nothing, unless it is ``always_packed``.
        """
        placed = self._placed(index)
        held = placed.reshape(self.sequences, -1)[self.held].reshape(-1)
        examples = [self.examples[i] if i >= 0 else None for i in held]
        shape, N = self._fit(self._need(placed)), self.completions.shape[1]
        rows = self.batch_size // self.sequences
        packed = always_packed or self.hidden is not None or not stays_padded(shape, rows, N)
        batch = collate(examples, shape, len(self.held), N, self.fields, self.examples.masked, packed=packed)
        if self.hidden is not None:
            first = self.hidden(int(index[0]))
            hidden = np.zeros((self.sequences, shape.tokens, first.shape[1]), first.dtype)
            for i, sequence, span in self.packed_spans(placed):
                hidden[sequence, span] = self.hidden(i)
            batch = dataclasses.replace(batch, hidden=hidden)  # type: ignore[arg-type]
        tokens = int(self.tokens[placed[placed >= 0]].sum())
        width = shape.tokens if packed else shape.prompt + N * shape.completion
        return IndexedBatch(placed, batch, held, tokens, self.sequences * width)

    def packed_spans(self, index: np.ndarray) -> Iterator[tuple[int, int, slice]]:
        """Every example of a batch, its packed sequence, and its positions there; :func:`pack` leaves no gap.

        ``index`` is the batch's, of :class:`IndexedBatch`.
        """
        for sequence, placed in enumerate(index.reshape(self.sequences, -1)):
            at = 0
            for i in placed[placed >= 0]:
                yield int(i), sequence, slice(at, at + int(self.tokens[i]))
                at += int(self.tokens[i])

    def with_hidden(self, hidden: Callable[[int], np.ndarray]) -> "Batches":
        """The same batches, with their examples' hidden states: ``hidden(i)`` is ``[tokens, D]``."""
        batches = copy.copy(self)
        batches.hidden = hidden
        return batches

    def first_pass(self, limit: int | None = None) -> int:
        """How many batches, of the first ``limit`` (default: all), can hold an example that no earlier one holds."""
        if self.examples.part is not None:
            return min(limit or len(self), len(self))
        return min(limit or len(self), len(self), -(-len(self.examples) // self.batch_size))

    def iterator(self) -> grain.DatasetIterator[IndexedBatch]:
        """An iterator from the first batch; its ``get_state`` and ``set_state`` keep and restore the position."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self.indices.map(self.collate).to_iter_dataset(options))

    def __iter__(self) -> Iterator[IndexedBatch]:
        return self.iterator()
