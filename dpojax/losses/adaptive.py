"""Objectives that weight a batch's pairs by statistics of the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.losses.compose import require
from dpojax.losses.dpo import log_ratios, sigmoid
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps

MOMENTUM = 0.9  # of the running statistics of beta_dpo
LOWEST_BETA = 1e-3
LOWEST_STD = 1e-3  # nats; before the first update all log-ratios agree up to rounding, and their deviation is 0


def _log_ratio_margins(policy: PairLogps, ref: PairLogps) -> Float[Array, " B"]:
    chosen, rejected = log_ratios(policy, ref)
    return chosen - rejected


def _mean(x: Float[Array, " B"], mask: Bool[Array, " B"]) -> Float[Array, ""]:
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1).astype(x.dtype)


def margin_moments(policy: PairLogps, ref: PairLogps, old: dict[str, Array] | None) -> dict[str, Array]:
    """Moving averages of the batches' mean log-ratio margin and of its standard deviation, for :func:`beta_dpo`.

    They start from 0, as in the authors' code, and move a tenth of the way with every batch.

    Args:
      policy, ref: the batch's sums of log-probabilities, ``[B]`` a field, nats.
      old: what the step before returned; None before the first.

    Returns:
      ``mean`` and ``std``, nats (no beta in them); 0-d arrays without a gradient.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4, 4])
    >>> zero = PairLogps(jnp.zeros(2), jnp.zeros(2), n, n)
    >>> new = margin_moments(zero.replace(chosen=jnp.array([1.0, 3.0])), zero, None)
    >>> [f"{name} {value:.4f}" for name, value in new.items()]  # 0.1 * 2 and 0.1 * sqrt(2)
    ['mean 0.2000', 'std 0.1414']
    """
    real = policy.chosen_len > 0
    margins = _log_ratio_margins(policy, ref)
    mean = _mean(margins, real)
    squares = jnp.where(real, jnp.square(margins - mean[None]), 0.0).sum()
    std = jnp.sqrt(squares / jnp.maximum(real.sum() - 1, 1).astype(margins.dtype))
    new = {"mean": (1 - MOMENTUM) * mean, "std": (1 - MOMENTUM) * std}
    if old is not None:
        new = {name: MOMENTUM * old[name] + value for name, value in new.items()}
    return jax.lax.stop_gradient(new)


def _drawn(
    scores: Float[Array, " B"], real: Bool[Array, " B"], keys: Array, keep: float
) -> tuple[Bool[Array, " B"], Int[Array, ""]]:
    """The rows that a draw without replacement keeps, by the log-weights ``scores``, and their number."""
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (), jnp.float32))(keys)
    order = jnp.argsort(jnp.where(real, -(scores + gumbel), jnp.inf))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    # How many there are is known only at run time, but not what int() makes of each possibility.
    count = jnp.array([max(int(n * keep), min(n, 1)) for n in range(len(order) + 1)])[real.sum()]
    return (rank < count) & real, count


@traits("key", batch=True, lengths=True, divergence=True, running={"beta_dpo": margin_moments})
def beta_dpo(
    policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, alpha: float = 0.6, keep: float = 0.8
) -> Float[Array, " B"]:
    r"""DPO with a beta for each batch, which grows with its mean margin, on a sample that favours the usual margins.

    .. math:: -\log \sigma(\beta' h), \qquad
              \beta' = \max\big(10^{-3},\; \beta\, (1 + \alpha\, (\bar h - m))\big), \qquad
              p(\text{kept}) \propto e^{-(h - m)^2 / (2 s^2)}

    with ``h`` as in :func:`~dpojax.losses.sigmoid`, its mean over the kept pairs :math:`\bar h`, and moving averages m
    and s of the batches' means and deviations of h. A share of the pairs is drawn, without replacement; the others'
    losses are 0, and the kept ones' are scaled so that the mean over the batch is that over the kept pairs. Source: Wu
    et al. 2024, beta-DPO (arXiv 2407.08639), and the authors' code (junkangwu/beta-DPO), which is followed: h is in
    nats, not in the reward's units, in which alpha would be this one over beta; m and s have moved with this batch
    already and start from 0; no gradient flows through beta', m, s and the draw. The lower bound on s, 0.001 nats, is
    ours: where policy and reference agree, as before the first update, the draw is uniform.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; a random key for every pair, the policy's. The
        moving averages are read from ``policy.running["beta_dpo"]``, which :func:`margin_moments` has brought up to
        date with this batch, and are those of a first step where there are none. A pair without tokens is left out.
      beta: strength of the KL penalty for a usual batch, above 0.
      alpha: by what part of it beta grows with each nat, 0 or above.
      keep: share of the pairs that is kept, above 0 and up to 1, rounded down to at least one pair; one minus the
        authors' filtering ratio.

    Returns:
      One loss a pair, ``[B]``; its mean is ``log 2`` where policy and reference agree.

    Raises:
      ValueError: an option outside its range, or no keys.

    >>> import jax, jax.numpy as jnp
    >>> n, keys = jnp.array([4, 4]), jax.random.split(jax.random.key(0), 2)
    >>> moments = {"mean": jnp.array(1.0), "std": jnp.array(1.0)}
    >>> r = PairLogps(jnp.array([0.0, 0.0]), jnp.array([0.0, 0.0]), n, n)
    >>> p = r.replace(chosen=jnp.array([2.0, 2.0]), key=keys, running={"beta_dpo": moments})
    >>> [f"{x:.6f}" for x in beta_dpo(p, r, beta=0.25, alpha=1.0, keep=1.0).tolist()]  # beta' 0.5: log(1 + exp(-1))
    ['0.313262', '0.313262']
    >>> sorted(f"{x:.6f}" for x in beta_dpo(p, r, beta=0.25, alpha=1.0, keep=0.5).tolist())  # one of two, twice
    ['0.000000', '0.626523']
    """
    if alpha < 0:
        raise ValueError(f"beta_dpo: alpha {alpha} must be 0 or above")
    if not 0 < keep <= 1:
        raise ValueError(f"beta_dpo: keep {keep} must be above 0 and at most 1")
    keys, real, margins = require(policy.key, "key"), policy.chosen_len > 0, _log_ratio_margins(policy, ref)
    fixed = jax.lax.stop_gradient(margins)
    moments = (policy.running or {}).get("beta_dpo") or margin_moments(policy, ref, None)
    mean, std = (jax.lax.stop_gradient(moments[name]).astype(fixed.dtype) for name in ("mean", "std"))
    scores = -0.5 * jnp.square((fixed - mean[None]) / jnp.maximum(std, LOWEST_STD)[None])
    kept, count = _drawn(scores, real, keys, keep)
    scaled = jnp.maximum(beta * (1 + alpha * (_mean(fixed, kept) - mean)), LOWEST_BETA)
    share = real.sum().astype(fixed.dtype) / jnp.maximum(count, 1).astype(fixed.dtype)
    losses = -jax.nn.log_sigmoid(scaled[None] * margins)
    return jnp.where(kept, share[None] * losses, 0.0)


@traits(batch=True, lengths=True, divergence=True)
def dr_dpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, beta_prime: float = 1.0) -> Float[Array, " B"]:
    r"""Distributionally robust DPO: pairs of great loss, whose labels may be flipped, count less.

    .. math:: -\beta' \log \frac{1}{B} \sum_i e^{-\ell_i / \beta'}, \qquad \ell = -\log \sigma(\beta h)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. It is one number for the batch, below the mean of the losses, which
    it becomes as beta' grows; its gradient is that of the losses, weighted by :math:`e^{-\ell_i / \beta'}` over their
    sum. Source: Wu et al. 2024, Dr. DPO (arXiv 2407.07880), and the authors' code (junkangwu/Dr_DPO), with the mean
    over the batch for the paper's expectation.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats. A pair without tokens is left out.
      beta: strength of the KL penalty, above 0.
      beta_prime: loss that makes a pair count e times less, above 0.

    Returns:
      ``[B]``: the batch's loss at every pair, so that it is their mean, and 0 at those without tokens; exactly
      ``log 2`` where policy and reference agree.

    Raises:
      ValueError: ``beta_prime`` not above 0.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4, 4])
    >>> p = PairLogps(jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]), n, n)
    >>> r = PairLogps(jnp.array([0.0, 0.0]), jnp.array([0.0, 0.0]), n, n)
    >>> [f"{x:.6f}" for x in dr_dpo(p, r, beta=0.5).tolist()]  # exp(-l) is sigmoid(1) and sigmoid(-1), their mean 1/2
    ['0.693147', '0.693147']
    """
    if beta_prime <= 0:
        raise ValueError(f"dr_dpo: beta_prime {beta_prime} must be above 0")
    real, losses = policy.chosen_len > 0, sigmoid(policy, ref, beta=beta)
    # Finite, and not minus infinity, so that a batch without any real row has no 0 / 0 in its gradient.
    exponents = jnp.where(real, -losses / beta_prime, -1e30)
    n = jnp.maximum(real.sum(), 1).astype(losses.dtype)
    total = -beta_prime * (jax.nn.logsumexp(exponents) - jnp.log(n))
    return jnp.where(real, total[None], 0.0)
