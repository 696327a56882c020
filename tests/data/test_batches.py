"""Batches: every row once an epoch, pairs kept together, few shapes, a position that can be restored."""

import numpy as np
import pytest

from dpojax.data import Batches, Example, collate
from dpojax.data.batches import plan_shapes


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(3, 99, rng.integers(low, high)).astype(np.int32)

    return [Example(tokens(1, 60), (tokens(1, 40), tokens(1, 40))) for _ in range(37)]


def test_collate_keeps_sides_together_and_pads_outwards():
    example = Example(np.array([5, 6], np.int32), (np.array([7, 1], np.int32), np.array([8, 9, 1], np.int32)))
    batch = collate([example], (4, 3), 2)
    assert batch.prompt.tolist() == [[0, 0, 5, 6], [0, 0, 0, 0]]
    assert batch.completions.tolist() == [[[7, 1, 0], [8, 9, 1]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.completion_len.tolist() == [[2, 3], [0, 0]] and batch.real.tolist() == [1, 0]


def test_epochs_visit_every_row_once_and_only_the_last_batch_is_short(examples):
    batches = Batches(examples, 8, max_shapes=3, seed=1, epochs=2)
    seen = [item.index for item in batches]
    assert len(seen) == len(batches) == 10
    assert [len(index) for index in seen] == [8] * 9 + [2]
    flat = np.concatenate(seen)
    assert sorted(flat[:37]) == sorted(flat[37:]) == list(range(37))
    assert list(flat[:37]) != list(flat[37:])


def test_shapes_are_few_and_hold_the_batches(examples):
    for max_shapes in (1, 2, 4):
        batches = Batches(examples, 4, max_shapes=max_shapes, seed=0)
        got = {(*item.batch.prompt.shape, *item.batch.completions.shape) for item in batches}
        assert len(got) <= len(batches.shapes) <= max_shapes
        for item in batches:
            for i, index in enumerate(item.index):
                P = item.batch.prompt_len[i]
                assert (item.batch.prompt[i, -P:] == examples[index].prompt).all()
                for n, completion in enumerate(examples[index].completions):
                    assert (item.batch.completions[i, n, : len(completion)] == completion).all()


def test_more_shapes_pad_less(examples):
    def computed(max_shapes):
        batches = Batches(examples, 4, max_shapes=max_shapes, seed=0)
        return sum(item.batch.prompt.size + item.batch.completions.size for item in batches)

    assert computed(8) < computed(2) < computed(1)


def test_planned_shapes_cover_every_need():
    rng = np.random.default_rng(0)
    needs = [(int(p), int(c)) for p, c in rng.integers(1, 3000, (500, 2))]
    shapes = plan_shapes(needs, 4, 2)
    assert len(shapes) <= 4
    assert all(any(p <= P and c <= C for P, C in shapes) for p, c in needs)


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_position_is_restored(examples, stop):
    whole = [item.index.tolist() for item in Batches(examples, 8, max_shapes=2, seed=3, epochs=2)]
    first = Batches(examples, 8, max_shapes=2, seed=3, epochs=2).iterator()
    for _ in range(stop):
        next(first)
    second = Batches(examples, 8, max_shapes=2, seed=3, epochs=2).iterator()
    second.set_state(first.get_state())
    assert [item.index.tolist() for item in second] == whole[stop:]


def test_seed_orders(examples):
    orders = [[item.index.tolist() for item in Batches(examples, 8, max_shapes=2, seed=s)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
