"""Preferences drawn from rewards."""

import numpy as np
import pytest

from dpojax.data import draw_preferences, pairs_of

REWARDS = np.array([[0.0, 1.0, 3.0, -1.0], [2.0, 2.0, 0.0, 1.0]])


def test_labels_follow_bradley_terry():
    """Of many draws, each pair's share is the model's probability, to four standard errors."""
    rewards = np.repeat(REWARDS[:1], 4000, axis=0)
    pairs = draw_preferences(rewards, scale=0.5, seed=3)
    assert len(pairs) == 4000 * 6
    for i, j in zip(*np.triu_indices(4, 1), strict=True):
        first, second = (pairs.chosen == i) & (pairs.rejected == j), (pairs.chosen == j) & (pairs.rejected == i)
        assert first.sum() + second.sum() == 4000
        p = 1 / (1 + np.exp(-0.5 * (REWARDS[0, i] - REWARDS[0, j])))
        assert abs(first.sum() / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000)


def test_noise_turns_labels_round():
    rewards = np.repeat(REWARDS[:1], 4000, axis=0)
    pairs = draw_preferences(rewards, labels="reward", label_noise=0.3, seed=1)
    wrong = np.diff(pairs.sides(rewards), axis=1)[:, 0] > 0
    np.testing.assert_array_equal(wrong, pairs.flipped)
    assert abs(wrong.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(pairs))
    clean = draw_preferences(rewards, labels="reward", seed=1)
    assert not clean.flipped.any() and (np.diff(clean.sides(rewards), axis=1) < 0).all()


def test_groups_and_ties():
    pairs = draw_preferences(REWARDS, labels="reward", group=2)
    assert [*zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)] == [(0, 1, 0), (0, 2, 3), (1, 3, 2)]
    assert len(draw_preferences(REWARDS, group=2)) == 4  # drawn labels know no ties


def test_pairs_in_tokens():
    pairs = draw_preferences(REWARDS[:1, :2], labels="reward")
    (example,) = pairs_of([[5, 6]], [[[1], [2, 3]]], pairs)
    assert [x.tolist() for x in (example.prompt, *example.completions)] == [[5, 6], [2, 3], [1]]
    assert len(pairs[np.array([0])]) == 1


@pytest.mark.parametrize(("options", "says"), [({"group": 3}, "divide the 4"), ({"label_noise": 0.7}, "from 0 to 0.5")])
def test_what_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        draw_preferences(REWARDS, **options)
