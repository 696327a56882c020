"""The objective of a reward model, whose scores stand where the others have log-probabilities."""

import jax
from jaxtyping import Array, Float

from dpojax.losses.traits import traits
from dpojax.types import PairLogps


@traits(reference=False, on="scores")
def reward_model(policy: PairLogps, ref: PairLogps, *, center_rewards_coefficient: float = 0.0) -> Float[Array, " B"]:
    r"""Negative log-likelihood of the preference under Bradley-Terry, of a reward model's scores.

    .. math:: -\log \sigma(r_w - r_l - m) + c\, (r_w + r_l)^2

    Source: Bradley and Terry 1952, as the loss of a reward model in Ouyang et al. 2022, InstructGPT (arXiv 2203.02155),
    equation 1, there over all pairs of a prompt's ranking. The margin m is that of Touvron et al. 2023, Llama 2 (arXiv
    2307.09288), equation 2. Only differences of scores matter to either; the last term, of Eisenstein et al. 2023,
    "Helping or herding?" (arXiv 2312.09244), equation 2 as TRL 1.16 cites it, holds their mean at 0. The mean over
    pairs is the loss of TRL's RewardTrainer.

    Args:
      policy: the model's scores, ``[B]`` a field; ``margin`` is read where it is given and 0 where it is not.
      ref: unused, so that this is an objective like the others.
      center_rewards_coefficient: c, 0 or above; TRL recommends 0.01 where it is wanted.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where the scores differ by the margin and c is 0.

    Raises:
      ValueError: ``center_rewards_coefficient`` below 0.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([3.0]), jnp.array([0.0]), n, n, margin=jnp.array([2.0]))
    >>> print(f"{reward_model(p, p, center_rewards_coefficient=0.5)[0]:.6f}")  # log(1 + exp(-1)) + 0.5 * 9
    4.813262
    """
    if center_rewards_coefficient < 0:
        raise ValueError(f"reward_model: center_rewards_coefficient {center_rewards_coefficient} must be 0 or above")
    logits = policy.chosen - policy.rejected
    if policy.margin is not None:
        logits = logits - policy.margin
    return -jax.nn.log_sigmoid(logits) + center_rewards_coefficient * (policy.chosen + policy.rejected) ** 2
