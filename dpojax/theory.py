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

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpojax.losses import Objective, traits_of
from dpojax.types import PairLogps, Sides

Scalar: TypeAlias = Float[Array, ""]
PerPrompt: TypeAlias = Float[Array, " X"]
Table: TypeAlias = Float[Array, "X Y"]
Pairwise: TypeAlias = Float[Array, "X Y Y"]

STEPS = 10_000
PEAK = 0.3  # nats a step at first; decayed to nothing, so that a policy can travel some 1500 nats and still settle


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


def pair_probabilities(logps: Table) -> Pairwise:
    r"""The probability of each ordered pair of unlike completions, drawn from a policy for a uniform prompt.

    .. math:: m(x, y, z) \propto \pi(y|x)\, \pi(z|x)\, [y \ne z], \qquad \sum_{y, z} m(x, y, z) = 1 / X

    Args:
      logps: of the policy that draws, ``[X, Y]``, nats; equal ones make all pairs equally likely.

    >>> m = pair_probabilities(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))
    >>> [f"{m[0, i, j]:.3f}" for i, j in ((0, 0), (0, 1), (1, 0), (0, 2), (1, 2))]  # 0 : 2 : 2 : 2 : 1 of ten
    ['0.000', '0.200', '0.200', '0.200', '0.100']
    """
    X, Y = logps.shape
    both = jnp.exp(logps[:, :, None] + logps[:, None, :]) * (1 - jnp.eye(Y, dtype=logps.dtype))[None]
    return both / (X * jnp.sum(both, axis=(1, 2), keepdims=True))


def all_pairs(
    logps: Table,
    ref_logps: Table,
    preferences: Pairwise,
    pair_weights: Pairwise | None = None,
    lengths: Int[Array, "X Y"] | None = None,
) -> tuple[PairLogps, PairLogps, Float[Array, " B"]]:
    r"""Every ordered pair of unlike completions as an objective sees it, and how often it is a (chosen, rejected) pair.

    .. math:: P(x, y_w, y_l) = 2\, m(x, y_w, y_l)\, p(y_w \succ y_l \mid x)

    Args:
      logps, ref_logps: log-probabilities of policy and reference, ``[X, Y]``, nats.
      preferences: ``[X, Y, Y]``, as :func:`preference_probability` has them.
      pair_weights: m, symmetric, as :func:`pair_probabilities` has it (default: all pairs equally likely).
      lengths: tokens of each completion (default: 1 each, and then the statistics of tokens are there too).

    Returns:
      ``(policy, ref, weights)``, with ``B = X * Y * (Y - 1)``; the weights sum to 1.

    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> policy, ref, weights = all_pairs(half, half, jnp.array([[[0.5, 0.25], [0.75, 0.5]]]))
    >>> weights.tolist()  # the first completion is the chosen one, then the second
    [0.25, 0.75]
    """
    X, Y = logps.shape
    first, second = (jnp.asarray(i) for i in np.nonzero(~np.eye(Y, dtype=bool)))
    if pair_weights is None:
        pair_weights = pair_probabilities(jnp.zeros_like(ref_logps))
    n = jnp.ones((X, Y), jnp.int32) if lengths is None else lengths
    weights = (2 * pair_weights * preferences)[:, first, second].ravel()

    def sides(values: Table) -> PairLogps:
        chosen, rejected = values[:, first].ravel(), values[:, second].ravel()
        n_chosen, n_rejected = n[:, first].ravel(), n[:, second].ravel()
        mean = jnp.sum(weights * n_chosen.astype(values.dtype))
        fields: dict[str, Any] = {}
        if lengths is None:  # a completion is one token, whose distribution is the prompt's
            square = jnp.repeat(jax.nn.logsumexp(2 * values, axis=-1), len(first))
            forward = jnp.repeat(kl(ref_logps, logps), len(first))
            fields = {"tokens": Sides(chosen[:, None], rejected[:, None])}
            fields |= {"squares": Sides(square, square), "kl": Sides(forward, forward)}
        return PairLogps(chosen, rejected, n_chosen, n_rejected, mean_chosen_len=mean, **fields)

    return sides(logps), sides(ref_logps), weights


def expected_loss(objective: Objective, logits: Table, ref_logps: Table, *pairs: Any) -> Scalar:
    r"""An objective's exact expectation over all pairs, as a function of a tabular softmax policy's logits.

    .. math:: \mathcal{L}(\theta) = \sum_{x, y_w, y_l} P(x, y_w, y_l)\, \ell(x, y_w, y_l), \qquad
              \pi(y|x) = \frac{e^{\theta_{xy}}}{\sum_z e^{\theta_{xz}}}

    Source: for ``sigmoid``, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    Args:
      objective: of pairs, one that judges each pair by itself; bind its options with ``functools.partial``.
      logits: ``[X, Y]``.
      ref_logps, *pairs: ``preferences`` and, if wanted, ``pair_weights`` and ``lengths``, as in :func:`all_pairs`.

    Raises:
      ValueError: the objective's loss of a pair depends on other pairs, or it is not of pairs of log-probabilities.

    >>> from dpojax.losses import LOSSES
    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{expected_loss(LOSSES['sigmoid'], half, half, jnp.full((1, 2, 2), 0.5)):.6f}")  # log 2
    0.693147
    """
    declared = traits_of(objective)
    if declared.batch or declared.on != "pairs" or declared.running:
        raise ValueError("expected_loss: the objective must be one that judges each pair of log-probabilities alone")
    policy, ref, weights = all_pairs(jax.nn.log_softmax(logits, axis=-1), ref_logps, *pairs)
    return jnp.sum(weights * objective(policy, ref))


def train(
    objective: Objective,
    ref_logps: Table,
    *pairs: Any,
    steps: int = STEPS,
    optimizer: optax.GradientTransformation | None = None,
) -> Float[Array, "T X Y"]:
    """Train a tabular softmax policy from the reference on the exact :func:`expected_loss`, without noise.

    The default optimizer is Adam, whose steps do not depend on the loss's scale, with a rate that falls to nothing
    along a cosine, so that also the hinge loss settles in its kinks.

    Args:
      objective, ref_logps, *pairs: as :func:`expected_loss` takes them.
      steps: number of updates.
      optimizer: another one; ``optax.sgd(rate)`` is gradient descent.

    Returns:
      Log-probabilities before the first step and after each, ``[steps + 1, X, Y]``; the last are the trained policy.

    >>> from functools import partial
    >>> from dpojax.losses import LOSSES
    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> path = train(partial(LOSSES["sigmoid"], beta=1.0), ref, preference_probability(reward))
    >>> [f"{p:.4f}" for p in jnp.exp(path[-1, 0])]  # the optimal policy
    ['0.3333', '0.6667']
    """
    chain = optimizer or optax.adam(optax.cosine_decay_schedule(PEAK, steps), eps=1e-20)
    gradient = jax.grad(lambda logits: expected_loss(objective, logits, ref_logps, *pairs))

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        updates, state = chain.update(gradient(carry[0]), carry[1], carry[0])
        logits = optax.apply_updates(carry[0], updates)
        return (logits, state), jax.nn.log_softmax(logits, axis=-1)

    start = jax.nn.log_softmax(ref_logps, axis=-1)
    path = jax.jit(lambda logits: jax.lax.scan(step, (logits, chain.init(logits)), None, length=steps)[1])(start)
    return jnp.concatenate([start[None], path])


def dpo_gradient(
    logits: Table, ref_logps: Table, preferences: Pairwise, beta: float, pair_weights: Pairwise | None = None
) -> Table:
    r"""The DPO loss's gradient by its formula, with respect to a tabular softmax policy's logits, ``[X, Y]``.

    .. math:: -\beta\, \mathbb{E}\left[\sigma(\hat r_l - \hat r_w)
              \left(\nabla \log \pi(y_w|x) - \nabla \log \pi(y_l|x)\right)\right], \qquad
              \frac{\partial \log \pi(y|x)}{\partial \theta_{xz}} = [y = z] - \pi(z|x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?", and appendix A.4.

    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> dpo_gradient(half, half, jnp.array([[[0.5, 0.0], [1.0, 0.5]]]), beta=0.5).tolist()  # -0.5 * 0.5 * (-1, 1)
    [[0.25, -0.25]]
    """
    if pair_weights is None:
        pair_weights = pair_probabilities(jnp.zeros_like(ref_logps))
    logps = jax.nn.log_softmax(logits, axis=-1)
    score = jnp.eye(logits.shape[1], dtype=logps.dtype)[None] - jnp.exp(logps)[:, None, :]  # [X, completion, logit]
    wrong = jnp.swapaxes(preference_probability(implied_reward(logps, ref_logps, beta)), 1, 2)  # sigma(r_l - r_w)
    weight = 2 * pair_weights * preferences * wrong
    return -beta * jnp.einsum("xwl,xwlk->xk", weight, score[:, :, None, :] - score[:, None, :, :])


def ipo_optimum(ref_logps: Table, preferences: Pairwise, beta: float, pair_weights: Pairwise | None = None) -> Table:
    r"""The policy that IPO (with ``length_normalize=False``) has on exact preferences: log-probabilities, ``[X, Y]``.

    .. math:: \min_u \sum_{y, z} m(y, z) \left(u_y - u_z - \frac{2 p(y \succ z) - 1}{2 \beta}\right)^2, \qquad
              \pi(y|x) \propto \pi_\mathrm{ref}(y|x)\, e^{u_y}

    ``p (h - c)^2 + (1 - p) (-h - c)^2`` with ``c = 1 / (2 beta)`` is ``(h - (2 p - 1) c)^2`` and a constant. Setting
    the derivative to zero gives the linear system of the pairs' graph Laplacian; for equally likely pairs ``u_y`` is
    the mean over all z, y included, of ``(2 p(y, z) - 1) / (2 beta)``. Source: Azar et al. 2023 (arXiv 2310.12036),
    whose equation 17 is the loss; the projection is derived here. Arguments as in :func:`all_pairs`.

    >>> ref, p = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[[0.5, 0.75], [0.25, 0.5]]])
    >>> logps = ipo_optimum(ref, p, beta=0.25)
    >>> print(f"{logps[0, 0] - logps[0, 1]:.4f}")  # one pair: (2 * 0.75 - 1) / 0.5
    1.0000
    """
    if pair_weights is None:
        pair_weights = pair_probabilities(jnp.zeros_like(ref_logps))
    m = pair_weights / jnp.sum(pair_weights, axis=(1, 2), keepdims=True)
    pull = jnp.sum(m * (2 * preferences - 1) / (2 * beta), axis=-1)
    laplacian = jnp.sum(m, axis=-1)[:, :, None] * jnp.eye(m.shape[1], dtype=m.dtype)[None] - m
    # The constant vector is the Laplacian's null space; adding 1 to every entry makes its sum zero the solution.
    u = jnp.linalg.solve(laplacian + 1, pull[:, :, None])[:, :, 0]
    return jax.nn.log_softmax(ref_logps + u, axis=-1)


def hinge_optimum(ref_logps: Table, preferences: Pairwise, beta: float, pair_weights: Pairwise | None = None) -> Table:
    r"""The policy that the hinge loss has on exact preferences, by a linear program, log-probabilities ``[X, Y]``.

    .. math:: \min_{k, s} \sum_{y \ne z} m(y, z)\, p(y \succ z)\, s_{yz}, \qquad
              s_{yz} \ge 1 - (k_y - k_z),\; s_{yz} \ge 0, \qquad
              \pi(y|x) \propto \pi_\mathrm{ref}(y|x)\, e^{k_y / \beta}

    Its constraints are a network's, so there is a solution of whole numbers k. Of two completions alone the one
    preferred more often has k greater by 1: ``h = sign(p - 1/2) / beta``. Ties leave more than one solution, of which
    this is one. Derived here. Arguments as in :func:`all_pairs`; not to be traced, as scipy solves it.

    >>> ref, p = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[[0.5, 0.75], [0.25, 0.5]]])
    >>> logps = hinge_optimum(ref, p, beta=0.25)
    >>> print(f"{logps[0, 0] - logps[0, 1]:.4f}")  # 1 / 0.25
    4.0000
    """
    from scipy.optimize import linprog  # type: ignore[import-untyped]

    X, Y = ref_logps.shape
    if pair_weights is None:
        pair_weights = pair_probabilities(jnp.zeros_like(ref_logps))
    first, second = np.nonzero(~np.eye(Y, dtype=bool))
    pairs = np.arange(len(first))
    cost = np.asarray(X * pair_weights * preferences, np.float64)[:, first, second]
    bound = np.zeros((len(first), Y + len(first)))  # -(k_y - k_z) - s <= -1
    bound[pairs, first], bound[pairs, second], bound[pairs, Y + pairs] = -1, 1, -1
    limits = [(0, 0)] + [(None, None)] * (Y - 1) + [(0, None)] * len(first)  # k of the first completion is 0
    best = [linprog(np.r_[np.zeros(Y), c], bound, -np.ones(len(first)), bounds=limits).x[:Y] for c in cost]
    return jax.nn.log_softmax(ref_logps + jnp.asarray(np.array(best), ref_logps.dtype) / beta, axis=-1)
