"""Figures of fresh samples: which policy wins, and how far it has moved from its reference."""

from collections.abc import Sequence

import numpy as np

from dpojax.evaluate.preferences import half_for_ties
from dpojax.evaluate.statistics import Estimate, estimate


def win_rate(scores: Sequence[float], others: Sequence[float], groups: Sequence[object] | None = None) -> Estimate:
    """Share of rows in which ``scores`` is above ``others``; a tie counts half."""
    return estimate(half_for_ties(np.asarray(scores) - np.asarray(others)), groups)


def sampled_kl(policy: np.ndarray, ref: np.ndarray, groups: Sequence[object] | None = None) -> Estimate:
    r"""Estimate of :math:`KL(\pi \| \pi_\mathrm{ref}) = E_{y \sim \pi} \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}`.

    Unbiased where the completions are drawn from the policy at temperature 1 and cut at nothing but a fixed length;
    the KL is then that of the distributions over completions up to that length.

    Args:
      policy, ref: log-probabilities of the policy's own samples, ``[n]``, nats.
      groups: rows of one prompt count as one observation.

    Returns:
      Nats per completion.
    """
    return estimate(np.asarray(policy, np.float64) - np.asarray(ref, np.float64), groups)
