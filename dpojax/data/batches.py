"""From examples to batches of few shapes; Grain orders, shuffles, batches and remembers the position."""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from dpojax.data.tokens import Example
from dpojax.types import PairBatch

MULTIPLE = 4  # widths are multiples of it, so that the shapes planned are few from the start

Shape = tuple[int, int]  # (P, C)


@dataclasses.dataclass(frozen=True)
class IndexedBatch:
    """A batch and which examples its real rows are."""

    index: np.ndarray  # [real rows]
    batch: PairBatch


def collate(examples: Sequence[Example], shape: Shape, batch_size: int) -> PairBatch:
    """Examples side by side, padded to ``shape`` and, with rows that do not count, to ``batch_size`` rows."""
    P, C = shape
    N = len(examples[0].completions)
    prompt = np.zeros((batch_size, P), np.int32)
    completions = np.zeros((batch_size, N, C), np.int32)
    prompt_len = np.zeros((batch_size,), np.int32)
    completion_len = np.zeros((batch_size, N), np.int32)
    for i, example in enumerate(examples):
        prompt_len[i] = len(example.prompt)
        prompt[i, P - prompt_len[i] :] = example.prompt
        for n, completion in enumerate(example.completions):
            completion_len[i, n] = len(completion)
            completions[i, n, : len(completion)] = completion
    real = (np.arange(batch_size) < len(examples)).astype(np.float32)
    return PairBatch(prompt, prompt_len, completions, completion_len, real)  # type: ignore[arg-type]  # NumPy


def _width(length: int, multiple: int) -> int:
    return max(1, -(-length // multiple)) * multiple


def plan_shapes(needs: Sequence[Shape], max_shapes: int, completions: int) -> list[Shape]:
    """At most ``max_shapes`` shapes that cover the batches' needs, with little padding.

    Starts from one shape per distinct need and, while there are too many, replaces the two whose joint cover adds
    the fewest computed tokens. Deterministic, so that a resumed run plans as it did before.
    """
    multiple = MULTIPLE
    while len({(_width(P, multiple), _width(C, multiple)) for P, C in needs}) > 64:
        multiple *= 2
    counts: dict[Shape, int] = {}
    for P, C in needs:
        shape = (_width(P, multiple), _width(C, multiple))
        counts[shape] = counts.get(shape, 0) + 1

    def cover(a: Shape, b: Shape) -> Shape:
        return max(a[0], b[0]), max(a[1], b[1])

    def cost(shape: Shape, count: int) -> int:
        return count * (shape[0] + completions * shape[1])

    while len(counts) > max_shapes:
        shapes = sorted(counts)
        pairs = [(a, b) for i, a in enumerate(shapes) for b in shapes[i + 1 :]]

        def added(pair: tuple[Shape, Shape]) -> tuple[int, Shape, Shape]:
            a, b = pair
            joint = cost(cover(a, b), counts[a] + counts[b])
            return joint - cost(a, counts[a]) - cost(b, counts[b]), a, b

        _, a, b = min(map(added, pairs))
        count = counts.pop(a) + counts.pop(b)
        counts[cover(a, b)] = counts.get(cover(a, b), 0) + count
    return sorted(counts)


class Batches:
    """All batches of a pass or of a run, in order.

    Args:
      examples: what to batch.
      batch_size: rows a batch.
      max_shapes: shapes at most.
      seed: shuffle, each epoch anew; None keeps similar lengths together instead, for passes whose order is free.
      epochs: passes over the examples. Batches run on over an epoch's end; only the very last may be part filled.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, *, max_shapes: int, seed: int | None = None, epochs: int = 1
    ):
        self.examples, self.batch_size = examples, batch_size
        # [n, 2]: prompt tokens, tokens of the longest completion
        self.lengths = np.array([(len(e.prompt), max(map(len, e.completions))) for e in examples])
        if seed is None:
            order = sorted(range(len(examples)), key=lambda i: (-int(self.lengths[i].sum()), i))
            indices = grain.MapDataset.source(order)
        else:
            indices = grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat(epochs)
        self.indices = indices.batch(batch_size)
        needs = [self._need(self.indices[i]) for i in range(len(self.indices))]
        self.shapes = plan_shapes(needs, max_shapes, len(examples[0].completions))

    def __len__(self) -> int:
        return len(self.indices)

    def _need(self, index: np.ndarray) -> Shape:
        P, C = self.lengths[index].max(axis=0)
        return int(P), int(C)

    def collate(self, index: np.ndarray) -> IndexedBatch:
        """The examples of these indices, in the smallest planned shape that holds them."""
        P, C = self._need(index)
        fitting = [shape for shape in self.shapes if shape[0] >= P and shape[1] >= C]
        shape = min(fitting, key=lambda s: s[0] + s[1])
        return IndexedBatch(index, collate([self.examples[i] for i in index], shape, self.batch_size))

    def iterator(self) -> grain.DatasetIterator[IndexedBatch]:
        """Iterates from the first batch; its ``get_state`` and ``set_state`` remember and restore the position."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self.indices.map(self.collate).to_iter_dataset(options))

    def __iter__(self) -> Iterator[IndexedBatch]:
        return self.iterator()
