"""What objectives do with exact preferences: their expected loss, gradient descent on it, and where it ends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpojax.losses import Objective, traits_of
from dpojax.theory.policies import Pairwise, Scalar, Table, implied_reward, kl, preference_probability
from dpojax.types import PairLogps, Sides

STEPS = 10_000
PEAK = 0.3  # nats a step at first; decayed to nothing, so that a policy can travel some 1500 nats and still settle


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
