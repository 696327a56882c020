r"""The theory of DPO on spaces of prompts and completions small enough to enumerate, where everything is exact.

Arrays are ``[X, Y]``, X prompts by Y completions of each; ``preferences[x, y, z]`` is the probability that y is
preferred to z. All is computed from log-probabilities. What each objective's policy is, when it is trained on exact
Bradley-Terry preferences (:func:`preference_probability`) over all pairs of a prompt's completions:

- DPO (``sigmoid``): :func:`optimal_policy`, the KL-constrained optimum of the reward, for any choice of pairs that
  connects the completions; ``robust`` has the same optimum where labels are flipped at the rate it is told.
- IPO: :func:`ipo_optimum`. One pair alone would have the margin ``h = (2 p - 1) / (2 beta)``; all pairs together have
  the weighted least squares fit to these by differences of log-ratios.
- Hinge: :func:`hinge_optimum`, the solution of a linear program. With two completions it is the margin ``1 / beta`` for
  the one that is preferred more often; with more, log-ratios differ by whole multiples of ``1 / beta``.
- ``unweighted``: none. Its gradient never changes; log-ratios diverge and the policy collapses.
"""

from dpojax.theory.objectives import (
    all_pairs,
    dpo_gradient,
    expected_loss,
    hinge_optimum,
    ipo_optimum,
    pair_probabilities,
    train,
)
from dpojax.theory.policies import (
    best_of_n_policy,
    expected_reward,
    frontier,
    frontier_reward,
    implied_reward,
    kl,
    log_partition,
    optimal_policy,
    plackett_luce,
    preference_probability,
    projected_reward,
    regularised_objective,
    total_variation,
)

__all__ = [
    "all_pairs",
    "best_of_n_policy",
    "dpo_gradient",
    "expected_loss",
    "expected_reward",
    "frontier",
    "frontier_reward",
    "hinge_optimum",
    "implied_reward",
    "ipo_optimum",
    "kl",
    "log_partition",
    "optimal_policy",
    "pair_probabilities",
    "plackett_luce",
    "preference_probability",
    "projected_reward",
    "regularised_objective",
    "total_variation",
    "train",
]
