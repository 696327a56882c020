"""DPO with one more term: for the chosen completion's likelihood, against length, or for the rewards' scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits(divergence=True, lengths=True)
def rpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, rpo_alpha: float = 1.0) -> Float[Array, " B"]:
    r"""DPO plus the negative log-likelihood of the chosen completion per token, which keeps it probable.

    .. math:: -\log \sigma(\beta h) - \frac{\alpha}{|y_w|} \log \pi(y_w|x)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Pang et al. 2024, iterative reasoning preference
    optimization (arXiv 2404.19733), equation 1, normalised by the pair's own length as there. TRL's loss types
    ``sigmoid`` and ``sft`` together divide by the batch's mean length instead, which is
    :func:`~dpojax.losses.weighted_sum` of the two here. Not the reward-aware preference optimization of the same
    abbreviation.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0.
      rpo_alpha: weight of the likelihood's term, at least 0; the paper takes 1.

    Returns:
      One loss a pair, ``[B]``.

    Raises:
      ValueError: ``rpo_alpha`` below 0.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{rpo(p, r, beta=0.5, rpo_alpha=2.0)[0]:.6f}")  # log(1 + exp(-1)) + 2 * 10 / 4
    5.313262
    """
    if rpo_alpha < 0:
        raise ValueError(f"rpo: rpo_alpha {rpo_alpha} must be at least 0")
    chosen, rejected = log_ratios(policy, ref)
    likelihood = policy.chosen / jnp.maximum(policy.chosen_len, 1).astype(jnp.float32)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)) - rpo_alpha * likelihood


@traits()
def dpop(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, dpop_lambda: float = 50.0) -> Float[Array, " B"]:
    r"""DPO-positive: the margin is lowered by the chosen completion's loss of log-probability against the reference.

    .. math:: -\log \sigma\left(\beta \left(h - \lambda \max\left(0,
              \log \frac{\pi_\mathrm{ref}(y_w|x)}{\pi(y_w|x)}\right)\right)\right)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Pal et al. 2024, Smaug (arXiv 2402.13228), equation 3. The
    penalty stands inside the sigmoid and is scaled by ``beta`` too. The authors released no training code.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0; the paper takes 0.3.
      dpop_lambda: weight of the penalty, at least 0; the paper takes 50, and 0 is DPO.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    Raises:
      ValueError: ``dpop_lambda`` below 0.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-12.0]), jnp.array([-17.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{dpop(p, r, beta=0.5, dpop_lambda=3.0)[0]:.6f}")  # h = 5, the penalty 1: log(1 + exp(-0.5 * (5 - 3)))
    0.313262
    """
    if dpop_lambda < 0:
        raise ValueError(f"dpop: dpop_lambda {dpop_lambda} must be at least 0")
    chosen, rejected = log_ratios(policy, ref)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - dpop_lambda * jax.nn.relu(-chosen)))


@traits()
def cal_dpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Calibrated DPO: the log-ratios are compared, and each is regressed onto plus or minus half of 1/beta.

    .. math:: -\log \sigma(u_w - u_l) + \left(u_w - \frac{1}{2\beta}\right)^2 + \left(u_l + \frac{1}{2\beta}\right)^2,
              \qquad u = \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    The squares are :func:`~dpojax.losses.sppo_hard`; the first term has no ``beta``. Source: Xiao et al. 2024, Cal-DPO
    (arXiv 2412.14516), algorithm 1 and the authors' code (Cal-DPO/Cal-DPO), whose ``shift`` is 0.5 here.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: inverse of the rewards' scale, above 0; the authors' code takes 0.001 to 0.1.

    Returns:
      One loss a pair, ``[B]``; ``log 2 + 1 / (2 beta^2)`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{cal_dpo(p, r, beta=0.25)[0]:.6f}")  # log(1 + exp(-2)) + (1 - 2) ** 2 + (-1 + 2) ** 2
    2.126928
    """
    chosen, rejected = log_ratios(policy, ref)
    calibration = jnp.square(chosen - 1 / (2 * beta)) + jnp.square(rejected + 1 / (2 * beta))
    return calibration - jax.nn.log_sigmoid(chosen - rejected)


@traits(divergence=True, lengths=True)
def r_dpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, alpha: float = 0.05) -> Float[Array, " B"]:
    r"""Length-regularised DPO: a part of the preference for a completion is attributed to its length.

    .. math:: -\log \sigma(\beta h + \alpha (|y_w| - |y_l|))

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Park et al. 2024, "Disentangling length from quality in
    direct preference optimization" (arXiv 2403.19159), equation 9. The sign follows from the reward ``r - alpha |y|``
    that is maximised, so that ``r`` is ``alpha |y|`` above what the policy implies: a longer chosen
    completion needs a smaller log-ratio margin and has a smaller gradient, a shorter one a larger.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0.
      alpha: reward that a token costs, at least 0; the paper takes 0.05 and 0.1 with a ``beta`` of 0.1, and 0 is DPO.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree and the lengths are equal.

    Raises:
      ValueError: ``alpha`` below 0.

    >>> import jax.numpy as jnp
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([4]), jnp.array([14]))
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), jnp.array([4]), jnp.array([14]))
    >>> print(f"{r_dpo(p, r, beta=1.0, alpha=0.1)[0]:.6f}")  # log(1 + exp(-(2 + 0.1 * (4 - 14))))
    0.313262
    """
    if alpha < 0:
        raise ValueError(f"r_dpo: alpha {alpha} must be at least 0")
    chosen, rejected = log_ratios(policy, ref)
    longer = (policy.chosen_len - policy.rejected_len).astype(chosen.dtype)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) + alpha * longer)
