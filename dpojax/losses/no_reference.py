"""Objectives without a reference model: the policy's own log-probabilities are compared."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.compose import EXPONENT
from dpojax.losses.sft import sft
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps

CERTAIN = -1e-6
"""The largest mean log-probability whose odds are taken: those of probability 1 are infinite."""


def _per_token(policy: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Mean log-probabilities of the chosen and rejected tokens, ``[B]`` each; 0 in padding rows."""
    chosen, rejected = (jnp.maximum(n, 1).astype(jnp.float32) for n in (policy.chosen_len, policy.rejected_len))
    return policy.chosen / chosen, policy.rejected / rejected


def _log_odds(mean: Float[Array, " B"]) -> Float[Array, " B"]:
    """The logit of exp(mean)."""
    mean = jnp.minimum(mean, CERTAIN)
    # expm1 alone is exact near 0; far below, what rounding takes from 1 is less than a float32 holds of the mean.
    return mean - jnp.log(-jnp.expm1(mean))


@traits(reference=False, lengths=True, per_token=True)
def orpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Odds ratio preference optimization: NLL of the chosen completion, and its odds against the rejected one's.

    .. math:: -\log \bar\pi(y_w|x) - \beta \log \sigma\left(\log \frac{\bar\pi(y_w|x)}{1 - \bar\pi(y_w|x)}
              - \log \frac{\bar\pi(y_l|x)}{1 - \bar\pi(y_l|x)}\right), \qquad
              \log \bar\pi(y|x) = \frac{1}{|y|} \log \pi(y|x)

    Source: Hong et al. 2024, ORPO (arXiv 2403.07691), equations 4, 6 and 7, whose lambda is ``beta`` here as in TRL
    1.16. The first term is the chosen completion's mean over its own tokens; the authors' code (xfactlab/orpo) and TRL
    take the mean over the batch's tokens and count the prompt's among them (the authors' code has an option against
    that). In the second term, which is TRL's, a mean log-probability above -1e-6 counts as -1e-6: odds are infinite
    at 0. It has no gradient there.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      ref: unused, so that this is an objective like the others.
      beta: weight of the odds ratio's term, at least 0.

    Returns:
      One loss a pair, ``[B]``, nats per token.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(4 * jnp.log(jnp.array([0.5])), 4 * jnp.log(jnp.array([0.2])), n, n)  # odds 1 and 1/4
    >>> print(f"{orpo(p, p, beta=0.5)[0]:.6f}")  # log(2) + 0.5 * log(1 + 1/4)
    0.804719
    """
    chosen, rejected = _per_token(policy)
    return -chosen - beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


@traits(reference=False, lengths=True, per_token=True)
def simpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 2.0, simpo_gamma: float = 1.0) -> Float[Array, " B"]:
    r"""Simple preference optimization: the mean log-probability is the reward, and the loss has a target margin.

    .. math:: -\log \sigma\left(\frac{\beta}{|y_w|} \log \pi(y_w|x) - \frac{\beta}{|y_l|} \log \pi(y_l|x)
              - \gamma\right)

    Source: Meng et al. 2024, SimPO (arXiv 2405.14734), equation 6; TRL 1.16's CPO loss type of this name with
    ``cpo_alpha=0``. ``simpo_gamma`` is gamma itself as in TRL; the authors' code (princeton-nlp/SimPO) takes
    gamma / beta, for which it recommends 0.5 to begin with, the default here.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      ref: unused, so that this is an objective like the others.
      beta: scale of the reward, above 0; the paper takes 2 to 2.5, the authors' later models 10.
      simpo_gamma: the target margin, in the reward's units.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where the margin is met.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> print(f"{simpo(p, p, beta=4.0, simpo_gamma=1.0)[0]:.6f}")  # log(1 + exp(-(4 * 0.5 - 1)))
    0.313262
    """
    chosen, rejected = _per_token(policy)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - simpo_gamma)


@traits(reference=False, lengths=True)
def cpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, cpo_alpha: float = 1.0) -> Float[Array, " B"]:
    r"""Contrastive preference optimization: DPO with a uniform reference, and NLL of the chosen completion.

    .. math:: -\log \sigma(\beta \log \pi(y_w|x) - \beta \log \pi(y_l|x))
              - \frac{\alpha}{\bar n} \log \pi(y_w|x), \qquad \bar n = \frac{1}{B} \sum_i |y_w^{(i)}|

    Source: Xu et al. 2024, CPO (arXiv 2401.08417), equation 3 for the first term and equation 5 for the sum, which has
    no alpha and whole log-probabilities in the second term. The mean over the batch's chosen tokens
    (:func:`~dpojax.losses.sft`) is that of the authors' code (fe1ixxu/ALMA) and of TRL 1.16.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      ref: unused, so that this is an objective like the others.
      beta: scale of the log-probabilities compared, above 0.
      cpo_alpha: weight of the imitation, at least 0.

    Returns:
      One loss a pair, ``[B]``.

    Raises:
      ValueError: ``cpo_alpha`` below 0.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> print(f"{cpo(p, p, beta=0.5, cpo_alpha=2.0)[0]:.6f}")  # log(1 + exp(-1)) + 2 * 10 / 4
    5.313262
    """
    if cpo_alpha < 0:
        raise ValueError(f"cpo: cpo_alpha {cpo_alpha} must be at least 0")
    return -jax.nn.log_sigmoid(beta * (policy.chosen - policy.rejected)) + cpo_alpha * sft(policy, ref)


def _shaped(mean: Float[Array, " B"], alpha: float) -> Float[Array, " B"]:
    """AlphaPO's reward of a mean log-probability, before its scale."""
    if abs(alpha) < 1e-6:
        return mean
    return -jnp.expm1(jnp.minimum(-alpha * mean, EXPONENT)) / alpha


@traits(reference=False, lengths=True, per_token=True)
def alphapo(
    policy: PairLogps, ref: PairLogps, *, beta: Beta = 2.5, alpha: float = 0.25, simpo_gamma: float = 0.1
) -> Float[Array, " B"]:
    r"""SimPO with a reward of another shape, which sets how strong the gradient of improbable completions is.

    .. math:: -\log \sigma(\beta r_w - \beta r_l - \gamma), \qquad
              r = \frac{1 - \bar\pi(y|x)^{-\alpha}}{\alpha}, \qquad \log \bar\pi(y|x) = \frac{1}{|y|} \log \pi(y|x)

    In the limit of alpha to 0, r is the mean log-probability and this is :func:`simpo`. Source: Gupta et al. 2025,
    AlphaPO (arXiv 2501.03884), section 3; TRL 1.16's CPO loss type of this name. The defaults are those of the paper's
    table 3 for Mistral as TRL's documentation gives them. ``-alpha log pi`` above 43 counts as 43 (TRL's
    overflows), so that float32 does not overflow; beyond it there is no gradient.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      ref: unused, so that this is an objective like the others.
      beta: scale of the reward, above 0.
      alpha: shape of the reward; negative ones are allowed, and those within 1e-6 of 0 count as 0.
      simpo_gamma: the target margin, in the reward's units.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where the margin is met.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(4 * jnp.log(jnp.array([0.5])), 4 * jnp.log(jnp.array([0.25])), n, n)
    >>> print(f"{alphapo(p, p, beta=1.0, alpha=1.0, simpo_gamma=1.0)[0]:.6f}")  # log(1 + exp(-((1 - 2) - (1 - 4) - 1)))
    0.313262
    """
    chosen, rejected = (_shaped(mean, alpha) for mean in _per_token(policy))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - simpo_gamma)
