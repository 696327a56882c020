"""Preferences drawn from rewards: several completions of each prompt, and which of two of them is preferred."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from dpojax.data.examples import Example

Labels = Literal["bradley_terry", "reward"]


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Pairs of completions by their indices: of pair i, completion ``chosen[i]`` of prompt ``prompt[i]`` is preferred
    to ``rejected[i]``. ``flipped`` says which labels were turned round as noise."""

    prompt: Int[np.ndarray, " n"]
    chosen: Int[np.ndarray, " n"]
    rejected: Int[np.ndarray, " n"]
    flipped: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: np.ndarray | slice) -> "Preferences":
        return Preferences(*(x[rows] for x in (self.prompt, self.chosen, self.rejected, self.flipped)))

    def sides(self, x: np.ndarray) -> np.ndarray:
        """Values of completions, ``[X, S]``, as those of pairs (chosen, rejected), ``[n, 2]``."""
        return np.stack([x[self.prompt, self.chosen], x[self.prompt, self.rejected]], axis=1)


def draw_preferences(
    rewards: Float[np.ndarray, "X S"],
    *,
    labels: Labels = "bradley_terry",
    scale: float = 1.0,
    label_noise: float = 0.0,
    group: int | None = None,
    seed: int = 0,
) -> Preferences:
    r"""Pairs of every prompt's completions, labelled by their rewards, in the order of the prompts.

    .. math:: p(y_1 \succ y_2 \mid x) = \sigma\left(s\, (r(x, y_1) - r(x, y_2))\right)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 1; four completions a prompt and all six pairs of them
    are its section 6.1.

    Args:
      rewards: of S completions of X prompts.
      labels: drawn from the Bradley-Terry model of the rewards; or ``reward``, the greater reward is preferred and
        equal ones are no pair.
      scale: s, by which rewards are multiplied first.
      label_noise: share of the labels, chosen at random, that are turned round.
      group: completions of which all pairs are made, one group after another (default: S); it divides S.
      seed: of the draws.

    Raises:
      ValueError: the group does not divide S, or the noise is no share below 1/2.

    >>> pairs = draw_preferences(np.array([[0.0, 2.0, 1.0]]), labels="reward")
    >>> [(int(a), int(b)) for a, b in zip(pairs.chosen, pairs.rejected)]
    [(1, 0), (2, 0), (1, 2)]
    """
    X, S = rewards.shape
    group = group or S
    if S % group or group < 2:
        raise ValueError(f"group {group}: must be at least 2 and divide the {S} completions of a prompt")
    if not 0 <= label_noise <= 0.5:
        raise ValueError(f"label_noise {label_noise}: must be from 0 to 0.5")
    i, j = np.triu_indices(group, 1)
    starts = np.arange(0, S, group)[:, None]
    first, second = (starts + i).ravel(), (starts + j).ravel()
    margin = scale * (rewards[:, first] - rewards[:, second]).astype(np.float64)
    rng = np.random.default_rng(seed)
    if labels == "reward":
        wins, valid = margin > 0, margin != 0
    else:
        wins, valid = rng.random(margin.shape) < 1 / (1 + np.exp(-margin)), np.ones(margin.shape, bool)
    flipped = rng.random(margin.shape) < label_noise
    wins ^= flipped
    prompt = np.broadcast_to(np.arange(X)[:, None], margin.shape)
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    return Preferences(prompt[valid], chosen[valid], rejected[valid], flipped[valid])


def pairs_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], preferences: Preferences
) -> list[Example]:
    """The pairs in tokens, ready for :class:`~dpojax.data.Batches`.

    Args:
      prompts: token ids of X prompts.
      completions: token ids of S completions of each, as :meth:`~dpojax.generate.Samples.lists` gives them.
      preferences: which is preferred to which.
    """
    start = [np.asarray(prompt, np.int32) for prompt in prompts]
    each = [[np.asarray(tokens, np.int32) for tokens in rows] for rows in completions]
    rows = zip(preferences.prompt, preferences.chosen, preferences.rejected, strict=True)
    return [Example(start[x], (each[x][chosen], each[x][rejected])) for x, chosen, rejected in rows]
