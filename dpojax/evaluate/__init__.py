"""Held-out preference accuracy, rewards, win rate and KL, each with its standard error."""

from dpojax.evaluate.divergence import exact_kl
from dpojax.evaluate.judges import judge_completions, reward_judge
from dpojax.evaluate.preferences import preference_estimates
from dpojax.evaluate.samples import sampled_kl, win_rate
from dpojax.evaluate.statistics import Estimate, estimate

__all__ = [
    "Estimate",
    "estimate",
    "exact_kl",
    "judge_completions",
    "preference_estimates",
    "reward_judge",
    "sampled_kl",
    "win_rate",
]
