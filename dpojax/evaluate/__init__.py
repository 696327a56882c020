"""Held-out preference accuracy, rewards, win rate and KL, each with its standard error."""

from dpojax.evaluate.divergence import exact_kl, make_kl_step
from dpojax.evaluate.frontier import best_of_n_kl, best_of_n_reward, reward_at, tilted
from dpojax.evaluate.judges import judge_completions, reward_judge
from dpojax.evaluate.preferences import preference_estimates
from dpojax.evaluate.samples import sampled_kl, win_rate
from dpojax.evaluate.statistics import Estimate, estimate

__all__ = [
    "Estimate",
    "best_of_n_kl",
    "best_of_n_reward",
    "estimate",
    "exact_kl",
    "judge_completions",
    "make_kl_step",
    "preference_estimates",
    "reward_at",
    "reward_judge",
    "sampled_kl",
    "tilted",
    "win_rate",
]
