"""What is exact on spaces small enough to enumerate: optima, rewards, preferences, divergences, frontiers.

Arrays are ``[X, Y]``, X prompts by Y completions of each. All is computed from log-probabilities.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar: TypeAlias = Float[Array, ""]
PerPrompt: TypeAlias = Float[Array, " X"]
Table: TypeAlias = Float[Array, "X Y"]
Pairwise: TypeAlias = Float[Array, "X Y Y"]


def log_partition(reward: Table, ref_logps: Table, beta: float | Scalar) -> PerPrompt:
    r"""The logarithm of the partition function of the KL-constrained optimum.

    .. math:: Z(x) = \sum_y \pi_\mathrm{ref}(y|x)\, e^{r(x, y) / \beta}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), below equation 4.

    Args:
      reward, ref_logps: rewards, and the reference's log-probabilities in nats, ``[X, Y]``.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``log Z``, ``[X]``.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{log_partition(reward, ref, beta=1.0)[0]:.6f}")  # log(0.5 * 2 + 0.5 * 4) = log 3
    1.098612
    """
    return jax.nn.logsumexp(ref_logps + reward / beta, axis=-1)


def optimal_policy(reward: Table, ref_logps: Table, beta: float | Scalar) -> Table:
    r"""The policy of the greatest expected reward under a KL penalty, in closed form: log-probabilities, ``[X, Y]``.

    .. math:: \log \pi_r(y|x) = \log \pi_\mathrm{ref}(y|x) + r(x, y) / \beta - \log Z(x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4, the maximum of equation 3. Arguments as in
    :func:`log_partition`.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> [f"{p:.6f}" for p in jnp.exp(optimal_policy(reward, ref, beta=1.0))[0]]  # 1 / 3 and 2 / 3
    ['0.333333', '0.666667']
    """
    return jax.nn.log_softmax(ref_logps + reward / beta, axis=-1)


def implied_reward(logps: Table, ref_logps: Table, beta: float, log_z: PerPrompt | None = None) -> Table:
    r"""The reward that a policy is the optimum of, ``[X, Y]``, with or without its term of the prompt alone.

    .. math:: r(x, y) = \beta \log \frac{\pi_r(y|x)}{\pi_\mathrm{ref}(y|x)} + \beta \log Z(x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5.

    Args:
      logps, ref_logps: log-probabilities, ``[X, Y]``, nats.
      beta: strength of the KL penalty, above 0.
      log_z: :func:`log_partition` of the reward, ``[X]``; None leaves its term out.

    >>> logps, ref = jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> [f"{r:.6f}" for r in implied_reward(logps, ref, beta=2.0)[0]]  # 2 log 0.5 and 2 log 1.5
    ['-1.386294', '0.810930']
    """
    reward = beta * (logps - ref_logps)
    return reward if log_z is None else reward + beta * log_z[:, None]


def preference_probability(reward: Table) -> Pairwise:
    r"""The Bradley-Terry probability that completion y is preferred to completion z, ``[X, y, z]``.

    .. math:: p(y \succ z \mid x) = \sigma(r(x, y) - r(x, z))

    Of implied rewards it is the same with and without ``beta log Z(x)``, which cancels. Source: Rafailov et al. 2023
    (arXiv 2305.18290), equation 1, and equation 6 for implied rewards.

    >>> p = preference_probability(jnp.log(jnp.array([[1.0, 3.0]])))
    >>> [f"{p[0, 0, 1]:.4f}", f"{p[0, 1, 0]:.4f}"]  # 1 / (1 + 3) and 3 / (3 + 1)
    ['0.2500', '0.7500']
    """
    return jax.nn.sigmoid(reward[:, :, None] - reward[:, None, :])


def projected_reward(reward: Table, ref_logps: Table, beta: float) -> Table:
    r"""The reward of the same class whose partition function is 1, ``[X, Y]``: the one that a policy implies by itself.

    .. math:: f(r)(x, y) = r(x, y) - \beta \log Z(x) = \beta \log \frac{\pi_r(y|x)}{\pi_\mathrm{ref}(y|x)}

    Rewards of a class differ by a function of the prompt, and so have the same preferences and the same optimum. Each
    class has one such reward. Source: Rafailov et al. 2023 (arXiv 2305.18290), section 5.1, equations 8 and 9, and
    theorem 1. Arguments as in :func:`log_partition`.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> [f"{r:.6f}" for r in projected_reward(reward, ref, beta=1.0)[0]]  # log 2/3 and log 4/3
    ['-0.405465', '0.287682']
    """
    return reward - beta * log_partition(reward, ref_logps, beta)[:, None]


def plackett_luce(reward: Table, ranking: Int[Array, "X K"]) -> PerPrompt:
    r"""The Plackett-Luce log-probability of a ranking, best first, ``[X]``; of two it is Bradley-Terry's.

    .. math:: \log p(\tau \mid x) = \sum_{k=1}^{K}
              \left[ r(x, y_{\tau(k)}) - \log \sum_{j=k}^{K} e^{r(x, y_{\tau(j)})} \right]

    Each place goes to one of those that are left, with probabilities as their ``exp r``. Of implied rewards it is the
    negative of DPO's loss on rankings, as ``beta log Z(x)`` cancels in every place. Source: Rafailov et al. 2023 (arXiv
    2305.18290), appendix A.3, equation 18, and equation 20 for the loss.

    Args:
      reward: ``[X, Y]``.
      ranking: indices of K unlike completions of each prompt.

    >>> p = jnp.exp(plackett_luce(jnp.log(jnp.array([[1.0, 2.0, 3.0]])), jnp.array([[2, 0, 1]])))
    >>> print(f"{p[0]:.6f}")  # 3/6 * 1/3 * 1
    0.166667
    """
    ranked = jnp.take_along_axis(reward, ranking, axis=1)
    return jnp.sum(ranked - jax.lax.cumlogsumexp(ranked, axis=1, reverse=True), axis=1)


def kl(logps: Table, ref_logps: Table) -> PerPrompt:
    r"""The divergence :math:`\sum_y \pi(y|x) \log (\pi(y|x) / \pi_\mathrm{ref}(y|x))` of each prompt, ``[X]``, nats.

    Source: the penalty of Rafailov et al. 2023 (arXiv 2305.18290), equation 3.

    >>> print(f"{kl(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]])))[0]:.6f}")
    0.130812
    """
    # A probability of zero counts for nothing, though its logarithm is infinite.
    return jnp.sum(jnp.exp(logps) * jnp.where(logps == -jnp.inf, 0.0, logps - ref_logps), axis=-1)


def best_of_n_policy(reward: Table, ref_logps: Table, n: int) -> Table:
    r"""The policy of Best-of-N, which draws n completions of the reference and gives the one of the greatest reward:
    log-probabilities, ``[X, Y]``.

    .. math:: \pi_N(y|x) = \frac{\pi_\mathrm{ref}(y|x)}{P_\le - P_<} \left(P_\le^N - P_<^N\right)

    ``P_<`` and ``P_<=`` are the reference's probabilities of a reward below y's, and of one not above it; completions
    of one reward share what falls to it as the reference does. Its KL from the reference is at most
    :func:`dpojax.evaluate.best_of_n_kl`. Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3.

    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> jnp.exp(best_of_n_policy(jnp.array([[0.0, 1.0]]), half, 2)).tolist()  # both draws are the worse one: 1/4
    [[0.25, 0.75]]
    """
    p = jnp.exp(ref_logps)
    below = jnp.einsum("xz,xyz->xy", p, reward[:, None, :] < reward[:, :, None])
    equal = jnp.einsum("xz,xyz->xy", p, reward[:, None, :] == reward[:, :, None])
    # P_<=^N - P_<^N = (P_<= - P_<)(P_<=^(N-1) + ... + P_<^(N-1)), whose second factor does not cancel.
    start = jnp.zeros_like(p), jnp.ones_like(p)
    powers, _ = jax.lax.fori_loop(0, n, lambda _, at: (at[0] * (below + equal) + at[1], at[1] * below), start)
    return ref_logps + jnp.log(powers)


def total_variation(logps: Table, other: Table) -> PerPrompt:
    r"""Half the sum of absolute differences of two policies' probabilities, from 0 to 1, ``[X]``.

    >>> total_variation(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]]))).tolist()
    [0.25]
    """
    return jnp.sum(jnp.abs(jnp.exp(logps) - jnp.exp(other)), axis=-1) / 2


def expected_reward(logps: Table, reward: Table) -> PerPrompt:
    r"""The expectation :math:`\sum_y \pi(y|x)\, r(x, y)` of each prompt, ``[X]``.

    >>> expected_reward(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([[0.0, 4.0]])).tolist()
    [3.0]
    """
    return jnp.sum(jnp.exp(logps) * reward, axis=-1)


def regularised_objective(logps: Table, reward: Table, ref_logps: Table, beta: float) -> PerPrompt:
    r"""What :func:`optimal_policy` maximises, expected reward less the KL penalty, ``[X]``.

    .. math:: J(\pi) = \mathbb{E}_\pi[r(x, y)] - \beta\, \mathrm{KL}(\pi \| \pi_\mathrm{ref})
              = \beta \log Z(x) - \beta\, \mathrm{KL}(\pi \| \pi_r)

    The second form is Gibbs' inequality: no policy beats ``pi_r``, and by how much one falls short. Source: Rafailov et
    al. 2023 (arXiv 2305.18290), equation 3 and appendix A.1.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> best = optimal_policy(reward, ref, beta=1.0)
    >>> print(f"{regularised_objective(best, reward, ref, beta=1.0)[0]:.6f}")  # beta log Z = log 3
    1.098612
    """
    return expected_reward(logps, reward) - beta * kl(logps, ref_logps)


def frontier(reward: Table, ref_logps: Table, betas: Float[Array, " K"]) -> tuple[Array, Array]:
    r"""The analytic frontier: no policy has more mean reward over the prompts at the same mean KL.

    .. math:: \beta \mapsto \left(\mathrm{KL}(\pi_{r,\beta} \| \pi_\mathrm{ref}),\;
              \mathbb{E}_{\pi_{r,\beta}}[r]\right)

    Prompts share a beta, the multiplier of their common KL. As it falls, KL and reward rise; the curve is concave, and
    its slope is beta. Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4; their figure 2 has such a curve.

    Args:
      reward, ref_logps: ``[X, Y]``.
      betas: ``[K]``, above 0.

    Returns:
      ``(kl, reward)``, each ``[K]``.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> x, y = frontier(reward, ref, jnp.array([1.0]))
    >>> print(f"{x[0]:.6f} {y[0]:.6f}")  # of (1/3, 2/3): log 2 + log(1/3)/3 + 2 log(2/3)/3 and log(2)/3 + 2 log(4)/3
    0.056633 1.155245
    """

    def point(beta: Scalar) -> tuple[Array, Array]:
        logps = optimal_policy(reward, ref_logps, beta)
        return kl(logps, ref_logps).mean(), expected_reward(logps, reward).mean()

    return jax.vmap(point)(betas)


def frontier_reward(reward: Table, ref_logps: Table, at: float | Scalar) -> Scalar:
    """The mean reward that :func:`frontier` has where its mean KL is ``at``, by bisection in log beta.

    Args:
      reward, ref_logps: ``[X, Y]``.
      at: mean KL over prompts, nats, 0 or more; beyond the frontier's end, its last reward, the greatest there is.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{frontier_reward(reward, ref, 0.0566330):.5f}")  # the point at beta = 1
    1.15525
    """
    spread = jnp.maximum(jnp.max(reward) - jnp.min(reward), 1e-6)

    def point(log_beta: Array) -> tuple[Array, Array]:
        return frontier(reward, ref_logps, (spread * jnp.exp(log_beta))[None])

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        far = point(middle)[0][0] > at  # this beta is too small
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    ends = jax.lax.fori_loop(0, 60, halve, (jnp.full_like(spread, -12.0), jnp.full_like(spread, 14.0)))
    return point(ends[1])[1][0]
