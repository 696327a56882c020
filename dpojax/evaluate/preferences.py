"""How well a policy's implicit reward orders held-out pairs."""

from collections.abc import Sequence

import numpy as np

from dpojax.evaluate.statistics import Estimate, estimate
from dpojax.train.objectives import reward_terms


def preference_estimates(
    policy: np.ndarray,
    ref: np.ndarray | None,
    lengths: np.ndarray,
    *,
    beta: float,
    groups: Sequence[object] | None = None,
) -> dict[str, Estimate]:
    """Held-out figures with their standard errors, under TRL's names.

    Args:
      policy: log-probabilities of (chosen, rejected), ``[n, 2]``, nats.
      ref: the reference's, or None, where log-probabilities alone are compared and there are no rewards.
      lengths: completion tokens, ``[n, 2]``.
      beta: scales the rewards.
      groups: rows of one prompt count as one observation (:func:`~dpojax.evaluate.statistics.estimate`).

    ``rewards/accuracies`` is the share of pairs whose chosen completion has the higher implicit reward;
    ``logps/accuracies`` the share where it has the higher log-probability, and ``.../per_token`` the higher one
    per token. A tie counts half; rewards tie where their difference is below float32's resolution
    (:data:`~dpojax.types.RESOLUTION`).
    """
    figures = {"logps/chosen": policy[:, 0], "logps/rejected": policy[:, 1]}
    per_token = policy / np.maximum(lengths, 1)
    figures["logps/margins"] = policy[:, 0] - policy[:, 1]
    figures["logps/accuracies"] = half_for_ties(policy[:, 0] - policy[:, 1])
    figures["logps/accuracies/per_token"] = half_for_ties(per_token[:, 0] - per_token[:, 1])
    if ref is not None:
        rewards = beta * (policy - ref)
        figures |= reward_terms(rewards[:, 0], rewards[:, 1], beta * np.abs(policy).sum(axis=1))
    return {name: estimate(values, groups) for name, values in figures.items()}


def half_for_ties(difference: np.ndarray) -> np.ndarray:
    """1 where above 0, 0 where below, one half where equal."""
    return (np.sign(difference) + 1) / 2
