"""Batches: every row once an epoch, pairs kept together, few shapes, a position that can be restored."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.data import Batches, Example, RowAnnotations, collate, lengths_only
from dpojax.data.batches import Shape, plan_shapes


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(3, 99, rng.integers(low, high)).astype(np.int32)

    return [Example(tokens(1, 60), (tokens(1, 40), tokens(1, 40))) for _ in range(37)]


def test_collate_keeps_sides_together_and_pads_outwards():
    example = Example(np.array([5, 6], np.int32), (np.array([7, 1], np.int32), np.array([8, 9, 1], np.int32)))
    batch = collate([example, None], Shape(tokens=8, targets=6, prompt=4, completion=3))
    assert batch.prompt.tolist() == [[0, 0, 5, 6], [0, 0, 0, 0]]
    assert batch.completions.tolist() == [[[7, 1, 0], [8, 9, 1]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.completion_len.tolist() == [[2, 3], [0, 0]] and batch.valid.tolist() == [1, 0]
    # Padded row 0 is [0 0 5 6 | 7 1 0 | 8 9 1]; packed: its tokens, then padding (index 20).
    assert batch.packing.padded_index.tolist() == [[2, 3, 4, 5, 7, 8, 9, 20]]
    assert batch.packing.target_index.tolist() == [[0, 1, 3, 4, 5, 12]]


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_streams_hold_every_real_token_once(examples, sequences):
    for item in Batches(examples, 8, max_shapes=3, seed=1, sequences=sequences):
        batch = item.batch
        P, C = batch.prompt.shape[1], batch.completions.shape[2]
        grid = np.concatenate([batch.prompt, batch.completions.reshape(8, -1)], axis=1).reshape(sequences, -1)
        whole = [np.concatenate([examples[i].prompt, *examples[i].completions]) if i >= 0 else [] for i in item.index]
        for index, row, expected in zip(
            batch.packing.padded_index, grid, np.split(np.arange(8), sequences), strict=True
        ):
            kept = index[index < row.size]
            assert row[kept].tolist() == np.concatenate([whole[i] for i in expected]).tolist()
        assert (batch.packing.target_index < 8 // sequences * 2 * C).sum() == batch.completion_len.sum()
        assert batch.prompt_len.max() <= P


def test_streams_are_even(examples):
    """A batch is dealt so that no device waits long for another, every pair once."""
    for item in Batches(examples, 12, max_shapes=3, seed=1, sequences=3):
        kept = (item.batch.packing.padded_index < item.batch.packing.padded_index.max()).sum(axis=1)
        longest = max(len(e.prompt) + sum(map(len, e.completions)) for e in examples)
        assert kept.max() - kept.min() <= longest


def test_epochs_visit_every_row_once_and_only_the_last_batch_is_short(examples):
    batches = Batches(examples, 8, max_shapes=3, seed=1, epochs=2)
    seen = [item.index[item.index >= 0] for item in batches]
    assert len(seen) == len(batches) == 10
    assert [len(index) for index in seen] == [8] * 9 + [2]
    flat = np.concatenate(seen)
    assert sorted(flat[:37]) == sorted(flat[37:]) == list(range(37))
    assert list(flat[:37]) != list(flat[37:])


def test_passes_of_free_order_visit_every_row_once(examples):
    seen = np.concatenate([item.index[item.index >= 0] for item in Batches(examples, 8, max_shapes=3)])
    assert sorted(seen) == list(range(37))


def test_shapes_are_few_and_hold_the_batches(examples):
    for max_shapes in (1, 2, 4):
        batches = Batches(examples, 4, max_shapes=max_shapes, seed=0)
        got = {tuple(x.shape for x in jax.tree.leaves(item.batch)) for item in batches}
        assert len(got) <= len(batches.shapes) <= max_shapes
        for item in batches:
            for i, index in enumerate(item.index):
                if index < 0:
                    continue
                P = item.batch.prompt_len[i]
                assert (item.batch.prompt[i, -P:] == examples[index].prompt).all()
                for n, completion in enumerate(examples[index].completions):
                    assert (item.batch.completions[i, n, : len(completion)] == completion).all()


def test_more_shapes_pad_less_and_the_share_is_what_is_computed(examples):
    shares = []
    for max_shapes in (1, 2, 8):
        batches = Batches(examples, 4, max_shapes=max_shapes, seed=0)
        real = sum(int(item.batch.prompt_len.sum() + item.batch.completion_len.sum()) for item in batches)
        shares.append(batches.valid_share)
        assert shares[-1] == real / sum(item.batch.packing.padded_index.size for item in batches)
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_quickstarts_pairs_are_padded_by_less_than_a_tenth(seed):
    """With tokens of four bytes, which is about what a real tokenizer makes of them."""
    examples = []
    for line in Path("experiments/data/sentiment_train.jsonl").read_text().splitlines():
        row = json.loads(line)
        tokens = [np.ones(-(-len(row[side]) // 4), np.int32) for side in ("prompt", "chosen", "rejected")]
        examples.append(Example(tokens[0], tuple(tokens[1:])))
    for batch_size in (8, 16):
        batches = Batches(examples, batch_size, max_shapes=8, seed=seed)
        assert batches.valid_share > 0.9 and len(batches.shapes) <= 8


def test_planned_shapes_cover_every_need_at_least_cost():
    rng = np.random.default_rng(0)
    needs = [Shape(*map(int, row)) for row in rng.integers(1, 3000, (500, 4))]
    shapes = plan_shapes(needs, 4, lambda s: s.tokens)
    assert all(any(s.cover(need) == s for s in shapes) for need in needs)
    # Five needs, two shapes: cut where the jump is.
    few = [Shape(n, 1, 1, 1) for n in (8, 16, 800, 808, 816)]
    assert [s.tokens for s in plan_shapes(few, 2, lambda s: s.tokens)] == [16, 816]
    assert [s.tokens for s in plan_shapes(few, 2, lambda s: s.tokens, real=np.inf)] == [816]


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


@pytest.mark.parametrize(
    ("notes", "fields"),
    [
        (RowAnnotations(), set()),
        (RowAnnotations(margin=0.0), {"score"}),
        (RowAnnotations(weight=0.0), {"weight"}),
        (RowAnnotations(label=0.0), {"label"}),
        (RowAnnotations(ranks=(0, 1), scores=(2.0, 0.5)), {"rank", "score"}),
    ],
)
def test_batches_have_the_annotations_that_some_example_has(examples, notes, fields):
    """Decided over all examples: every batch has the same structure."""
    examples[20] = Example(examples[20].prompt, examples[20].completions, notes)
    batches = [item.batch for item in Batches(examples, 8, max_shapes=1, seed=0)]
    for batch in [*batches, lengths_only(examples)]:
        assert {name for name, x in vars(batch.annotations).items() if x is not None} == fields
    assert len({jax.tree.structure(batch) for batch in batches}) == 1


def test_a_margin_becomes_a_difference_of_scores(examples):
    prompt, pair = examples[0].prompt, examples[0].completions
    rows = [
        Example(prompt, pair, RowAnnotations(margin=2.0, weight=3.0)),
        Example(prompt, (*pair, pair[0]), RowAnnotations(ranks=(0, 1, 1), scores=(5.0, 1.0, 1.0), weight=0.5)),
        None,
    ]
    batch = collate(rows, Shape(tokens=999, targets=999, prompt=64, completion=64))
    assert batch.annotations.score.tolist() == [[2, 0, 0], [5, 1, 1], [0, 0, 0]]
    assert batch.annotations.rank.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert batch.annotations.weight.tolist() == [3, 0.5, 0] and batch.annotations.label is None
