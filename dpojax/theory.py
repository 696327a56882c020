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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpojax.losses import Objective, traits_of
from dpojax.types import PairLogps

STEPS = 10_000
PEAK = 0.3  # nats a step at first; decayed to nothing, so that a policy can travel some 1500 nats and still settle


def log_partition(reward: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"], beta: float) -> Float[Array, " X"]:
    r"""The logarithm of the partition function of the KL-constrained optimum.

    .. math:: Z(x) = \sum_y \pi_\mathrm{ref}(y|x)\, e^{r(x, y) / \beta}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), below equation 4.

    Args:
      reward: ``[X, Y]``.
      ref_logps: the reference's log-probabilities, ``[X, Y]``, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``log Z``, ``[X]``.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{log_partition(reward, ref, beta=1.0)[0]:.6f}")  # log(0.5 * 2 + 0.5 * 4) = log 3
    1.098612
    """
    return jax.nn.logsumexp(ref_logps + reward / beta, axis=-1)


def optimal_policy(reward: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"], beta: float) -> Float[Array, "X Y"]:
    r"""The policy of the greatest expected reward under a KL penalty, in closed form.

    .. math:: \log \pi_r(y|x) = \log \pi_\mathrm{ref}(y|x) + r(x, y) / \beta - \log Z(x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4, the maximum of equation 3.

    Args:
      reward, ref_logps: ``[X, Y]``.
      beta: strength of the KL penalty, above 0.

    Returns:
      Log-probabilities, ``[X, Y]``, nats.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> [f"{p:.6f}" for p in jnp.exp(optimal_policy(reward, ref, beta=1.0))[0]]  # 1 / 3 and 2 / 3
    ['0.333333', '0.666667']
    """
    return ref_logps + reward / beta - log_partition(reward, ref_logps, beta)[:, None]


def implied_reward(
    logps: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    beta: float,
    log_z: Float[Array, " X"] | None = None,
) -> Float[Array, "X Y"]:
    r"""The reward that a policy is the optimum of, with or without its term of the prompt alone.

    .. math:: r(x, y) = \beta \log \frac{\pi_r(y|x)}{\pi_\mathrm{ref}(y|x)} + \beta \log Z(x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5.

    Args:
      logps, ref_logps: log-probabilities, ``[X, Y]``, nats.
      beta: strength of the KL penalty, above 0.
      log_z: :func:`log_partition` of the reward; None leaves its term out.

    Returns:
      ``[X, Y]``, in the reward's units.

    >>> logps, ref = jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> [f"{r:.6f}" for r in implied_reward(logps, ref, beta=2.0)[0]]  # 2 log 0.5 and 2 log 1.5
    ['-1.386294', '0.810930']
    """
    reward = beta * (logps - ref_logps)
    return reward if log_z is None else reward + beta * log_z[:, None]


def preference_probability(reward: Float[Array, "X Y"]) -> Float[Array, "X Y Y"]:
    r"""The Bradley-Terry probability that each completion is preferred to each other one.

    .. math:: p(y \succ z \mid x) = \sigma(r(x, y) - r(x, z))

    Of implied rewards it is the same with and without ``beta log Z(x)``, which cancels. Source: Rafailov et al. 2023
    (arXiv 2305.18290), equation 1, and equation 6 for implied rewards.

    Args:
      reward: ``[X, Y]``.

    Returns:
      ``[X, Y, Y]``; ``[x, y, z]`` is of y over z, and 1/2 on the diagonal.

    >>> p = preference_probability(jnp.log(jnp.array([[1.0, 3.0]])))
    >>> [f"{p[0, 0, 1]:.4f}", f"{p[0, 1, 0]:.4f}"]  # 1 / (1 + 3) and 3 / (3 + 1)
    ['0.2500', '0.7500']
    """
    return jax.nn.sigmoid(reward[:, :, None] - reward[:, None, :])


def kl(logps: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"]) -> Float[Array, " X"]:
    r"""The Kullback-Leibler divergence :math:`\sum_y \pi(y|x) \log (\pi(y|x) / \pi_\mathrm{ref}(y|x))` of each prompt.

    Source: the penalty of Rafailov et al. 2023 (arXiv 2305.18290), equation 3.

    Args:
      logps, ref_logps: log-probabilities, ``[X, Y]``, nats; the expectation is under the first.

    Returns:
      ``[X]``, nats.

    >>> print(f"{kl(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]])))[0]:.6f}")
    0.130812
    """
    return jnp.sum(jnp.exp(logps) * (logps - ref_logps), axis=-1)


def total_variation(logps: Float[Array, "X Y"], other: Float[Array, "X Y"]) -> Float[Array, " X"]:
    r"""Half the sum of absolute differences of two policies' probabilities, from 0 to 1.

    Args:
      logps, other: log-probabilities, ``[X, Y]``, nats.

    Returns:
      ``[X]``.

    >>> total_variation(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]]))).tolist()
    [0.25]
    """
    return jnp.sum(jnp.abs(jnp.exp(logps) - jnp.exp(other)), axis=-1) / 2


def expected_reward(logps: Float[Array, "X Y"], reward: Float[Array, "X Y"]) -> Float[Array, " X"]:
    r"""The expectation :math:`\sum_y \pi(y|x)\, r(x, y)` of each prompt, ``[X]``.

    >>> expected_reward(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([[0.0, 4.0]])).tolist()
    [3.0]
    """
    return jnp.sum(jnp.exp(logps) * reward, axis=-1)


def regularised_objective(
    logps: Float[Array, "X Y"], reward: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"], beta: float
) -> Float[Array, " X"]:
    r"""What :func:`optimal_policy` maximises: expected reward less the KL penalty.

    .. math:: J(\pi) = \mathbb{E}_\pi[r(x, y)] - \beta\, \mathrm{KL}(\pi \| \pi_\mathrm{ref})
              = \beta \log Z(x) - \beta\, \mathrm{KL}(\pi \| \pi_r)

    The second form is Gibbs' inequality: no policy beats ``pi_r``, and by how much one falls short. Source: Rafailov et
    al. 2023 (arXiv 2305.18290), equation 3 and appendix A.1.

    Args:
      logps, reward, ref_logps: ``[X, Y]``.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``[X]``, in the reward's units.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> best = optimal_policy(reward, ref, beta=1.0)
    >>> print(f"{regularised_objective(best, reward, ref, beta=1.0)[0]:.6f}")  # beta log Z = log 3
    1.098612
    """
    return expected_reward(logps, reward) - beta * kl(logps, ref_logps)


def frontier(
    reward: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"], betas: Float[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    r"""The analytic frontier of reward against KL: no policy has more mean reward at the same mean KL.

    .. math:: \beta \mapsto \left(\mathrm{KL}(\pi_{r,\beta} \| \pi_\mathrm{ref}),\;
              \mathbb{E}_{\pi_{r,\beta}}[r]\right)

    Means are over the prompts, which share a beta: the multiplier of their common KL. As beta falls, KL and reward
    rise; the curve is concave, and its slope is beta. Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4; the
    curve is that of their figure 2.

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

    def point(beta: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        logps = optimal_policy(reward, ref_logps, beta)  # type: ignore[arg-type]
        return kl(logps, ref_logps).mean(), expected_reward(logps, reward).mean()

    return jax.vmap(point)(betas)


def frontier_reward(
    reward: Float[Array, "X Y"], ref_logps: Float[Array, "X Y"], at: Float[Array, ""]
) -> Float[Array, ""]:
    """The mean reward that :func:`frontier` has where its mean KL is ``at``, by bisection in log beta.

    Args:
      reward, ref_logps: ``[X, Y]``.
      at: mean KL over prompts, nats, 0 or more; beyond the frontier's end, its last reward, the greatest there is.

    Returns:
      A scalar, in the reward's units.

    >>> reward, ref = jnp.log(jnp.array([[2.0, 4.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{frontier_reward(reward, ref, jnp.array(0.0566330)):.5f}")  # the point at beta = 1
    1.15525
    """
    spread = jnp.maximum(jnp.max(reward) - jnp.min(reward), 1e-6)

    def at_log_beta(log_beta: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        x, y = frontier(reward, ref_logps, (spread * jnp.exp(log_beta))[None])
        return x[0], y[0]

    def halve(_: int, ends: tuple[Float[Array, ""], Float[Array, ""]]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        low, high = ends
        middle = (low + high) / 2
        far = at_log_beta(middle)[0] > at  # beta is too small
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    ends = (jnp.full_like(spread, -12.0), jnp.full_like(spread, 8.0))
    return at_log_beta(jax.lax.fori_loop(0, 60, halve, ends)[1])[1]


def pair_probabilities(logps: Float[Array, "X Y"]) -> Float[Array, "X Y Y"]:
    r"""The probability of each ordered pair of unlike completions that are drawn from a policy, prompts uniformly.

    .. math:: m(x, y, z) \propto \pi(y|x)\, \pi(z|x)\, [y \ne z], \qquad \sum_{y, z} m(x, y, z) = 1 / X

    Args:
      logps: of the policy that draws, ``[X, Y]``, nats; equal ones make all pairs equally likely.

    Returns:
      ``[X, Y, Y]``, symmetric, 0 on the diagonal; its sum is 1.

    >>> pair_probabilities(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))[0].round(4).tolist()  # 2 : 2 : 1
    [[0.0, 0.20000000298023224, 0.20000000298023224], [0.20000000298023224, 0.0, 0.10000000149011612], \
[0.20000000298023224, 0.10000000149011612, 0.0]]
    """
    X, Y = logps.shape
    both = jnp.exp(logps[:, :, None] + logps[:, None, :]) * (1 - jnp.eye(Y, dtype=logps.dtype))[None]
    return both / (X * jnp.sum(both, axis=(1, 2), keepdims=True))


def all_pairs(
    logps: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    preferences: Float[Array, "X Y Y"],
    pair_weights: Float[Array, "X Y Y"] | None = None,
    lengths: Int[Array, "X Y"] | None = None,
) -> tuple[PairLogps, PairLogps, Float[Array, " B"]]:
    r"""Every ordered pair of unlike completions as an objective sees it, and how often it is a (chosen, rejected) pair.

    .. math:: P(x, y_w, y_l) = 2\, m(x, y_w, y_l)\, p(y_w \succ y_l \mid x)

    Args:
      logps, ref_logps: log-probabilities of policy and reference, ``[X, Y]``, nats.
      preferences: ``[X, Y, Y]``, as :func:`preference_probability` has them.
      pair_weights: m, the probability of each pair, symmetric, as :func:`pair_probabilities` has it (default: all
        pairs of a prompt, and all prompts, equally likely).
      lengths: tokens of each completion (default: 1 each, and then per-token fields are there too).

    Returns:
      ``(policy, ref, weights)``, with ``B = X * Y * (Y - 1)``; the weights sum to 1.

    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> policy, ref, weights = all_pairs(half, half, jnp.array([[[0.5, 0.2], [0.8, 0.5]]]))
    >>> weights.round(4).tolist()  # the first completion is the chosen one, then the second
    [0.20000000298023224, 0.800000011920929]
    """
    X, Y = logps.shape
    first, second = (jnp.asarray(i) for i in np.nonzero(~np.eye(Y, dtype=bool)))
    if pair_weights is None:
        pair_weights = pair_probabilities(jnp.zeros_like(ref_logps))
    n = jnp.ones((X, Y), jnp.int32) if lengths is None else lengths
    weights = (2 * pair_weights * preferences)[:, first, second].ravel()

    def sides(values: Float[Array, "X Y"]) -> PairLogps:
        chosen, rejected = values[:, first].ravel(), values[:, second].ravel()
        n_chosen, n_rejected = n[:, first].ravel(), n[:, second].ravel()
        mean = jnp.sum(weights * n_chosen.astype(values.dtype))
        fields: dict[str, Any] = {}
        if lengths is None:  # a completion is one token, whose distribution is the prompt's
            square = jnp.repeat(jax.nn.logsumexp(2 * values, axis=-1), len(first))
            forward = jnp.repeat(kl(ref_logps, logps), len(first))
            fields = {"chosen_tokens": chosen[:, None], "rejected_tokens": rejected[:, None]}
            fields |= {"chosen_squares": square, "rejected_squares": square}
            fields |= {"chosen_kl": forward, "rejected_kl": forward}
        return PairLogps(chosen, rejected, n_chosen, n_rejected, mean_chosen_len=mean, **fields)

    return sides(logps), sides(ref_logps), weights


def expected_loss(
    objective: Objective,
    logits: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    preferences: Float[Array, "X Y Y"],
    pair_weights: Float[Array, "X Y Y"] | None = None,
    lengths: Int[Array, "X Y"] | None = None,
) -> Float[Array, ""]:
    r"""An objective's exact expectation over all pairs, as a function of a tabular softmax policy's logits.

    .. math:: \mathcal{L}(\theta) = \sum_{x, y_w, y_l} P(x, y_w, y_l)\, \ell(x, y_w, y_l), \qquad
              \pi(y|x) = \frac{e^{\theta_{xy}}}{\sum_z e^{\theta_{xz}}}

    Source: for ``sigmoid``, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    Args:
      objective: of pairs, one that judges each pair by itself; bind its options with ``functools.partial``.
      logits: ``[X, Y]``.
      ref_logps, preferences, pair_weights, lengths: as :func:`all_pairs` takes them.

    Returns:
      A scalar.

    Raises:
      ValueError: the objective's loss of a pair depends on other pairs, or it is not of pairs of log-probabilities.

    >>> from dpojax.losses import LOSSES
    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(f"{expected_loss(LOSSES['sigmoid'], half, half, jnp.full((1, 2, 2), 0.5)):.6f}")  # log 2
    0.693147
    """
    declared = traits_of(objective)
    if declared.batch or declared.unpaired or declared.rewards or declared.running:
        raise ValueError(
            "expected_loss: the objective must be one that judges each pair of log-probabilities by itself"
        )
    logps = jax.nn.log_softmax(logits, axis=-1)
    policy, ref, weights = all_pairs(logps, ref_logps, preferences, pair_weights, lengths)
    return jnp.sum(weights * objective(policy, ref))


def train(
    objective: Objective,
    ref_logps: Float[Array, "X Y"],
    preferences: Float[Array, "X Y Y"],
    pair_weights: Float[Array, "X Y Y"] | None = None,
    lengths: Int[Array, "X Y"] | None = None,
    *,
    steps: int = STEPS,
    optimizer: optax.GradientTransformation | None = None,
) -> Float[Array, "T X Y"]:
    """Train a tabular softmax policy from the reference on the exact :func:`expected_loss`, without noise.

    The default optimizer is Adam, whose steps do not depend on the loss's scale, with a rate that falls to nothing
    along a cosine, so that also the hinge loss settles in its kinks.

    Args:
      objective, ref_logps, preferences, pair_weights, lengths: as :func:`expected_loss` takes them.
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
    gradient = jax.grad(lambda logits: expected_loss(objective, logits, ref_logps, preferences, pair_weights, lengths))

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        updates, state = chain.update(gradient(carry[0]), carry[1], carry[0])
        logits = optax.apply_updates(carry[0], updates)
        return (logits, state), jax.nn.log_softmax(logits, axis=-1)

    @jax.jit
    def run(logits: Array) -> Array:
        return jax.lax.scan(step, (logits, chain.init(logits)), None, length=steps)[1]

    start = jax.nn.log_softmax(ref_logps, axis=-1)
    return jnp.concatenate([start[None], run(start)])


def dpo_gradient(
    logits: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    preferences: Float[Array, "X Y Y"],
    beta: float,
    pair_weights: Float[Array, "X Y Y"] | None = None,
) -> Float[Array, "X Y"]:
    r"""The DPO loss's gradient by its formula, with respect to a tabular softmax policy's logits.

    .. math:: -\beta\, \mathbb{E}\left[\sigma(\hat r_l - \hat r_w)
              \left(\nabla \log \pi(y_w|x) - \nabla \log \pi(y_l|x)\right)\right], \qquad
              \frac{\partial \log \pi(y|x)}{\partial \theta_{xz}} = [y = z] - \pi(z|x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?", and appendix A.4.

    Args:
      logits, ref_logps, preferences, pair_weights: as :func:`expected_loss` takes them.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``[X, Y]``.

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
