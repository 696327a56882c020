"""Weighted preference optimization: pairs that are likely under the policy count more."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.compose import EXPONENT, at_beta, require, with_traits
from dpojax.losses.dpo import sigmoid
from dpojax.losses.traits import Beta, Objective, traits, traits_of
from dpojax.types import PairLogps


def _weights(policy: PairLogps) -> Float[Array, " B"]:
    chosen = policy.chosen - require(policy.squares, "squares").chosen
    rejected = policy.rejected - require(policy.squares, "squares").rejected
    lengths = (jnp.maximum(n, 1).astype(chosen.dtype) for n in (policy.chosen_len, policy.rejected_len))
    exponent = chosen / next(lengths) + rejected / next(lengths)
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(exponent, EXPONENT)))


def wpo_weighted(objective: Objective) -> Objective:
    r"""The objective with its pairs weighted by how likely they are under the policy, so that they count as on-policy.

    .. math:: w(y_w)\, w(y_l)\, \ell(y_w, y_l), \qquad
              w(y) = \exp\Big(\frac{1}{|y|} \sum_t \log
              \frac{\pi(y_t|x, y_{<t})}{\sum_v \pi(v|x, y_{<t})^2}\Big)

    where w is about 1 for a completion sampled from the policy, and no gradient flows through it. Source: Zhou et al.
    2024, WPO (arXiv 2406.11827), equation 2 with the weights' "sampled alignment", and TRL 1.16's ``use_weighting``.
    The authors' code (wzhouad/WPO) lets no weight of a pair exceed 1; TRL and this do not bound it, but for an exponent
    of 43, so that float32 does not overflow.

    Args:
      objective: of pairs.

    Raises:
      ValueError: the objective is of labelled completions or of rewards.

    >>> import jax.numpy as jnp
    >>> from dpojax.types import Sides
    >>> from dpojax.losses import hinge
    >>> n, half = jnp.array([2]), 2 * jnp.log(jnp.array([0.5]))
    >>> p = PairLogps(half, half, n, n, squares=Sides(half, 2 * half))  # weights 1 and 2
    >>> r = PairLogps(half, half, n, n)
    >>> print(f"{wpo_weighted(hinge)(p, r)[0]:.4f}")  # 1 * 2 * (1 - 0)
    2.0000
    """
    declared = traits_of(objective)
    if declared.on != "pairs":
        raise ValueError("wpo_weighted: the objective must be of pairs of completions")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        return _weights(policy) * at_beta(objective, policy, ref, beta)

    return with_traits(losses, declared, objective, reads=declared.reads | {"squares"}, lengths=True)


@traits("squares", lengths=True, divergence=True)
def wpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""The DPO loss with its pairs weighted by how likely they are under the policy.

    .. math:: -w(y_w)\, w(y_l) \log \sigma(\beta h), \qquad
              w(y) = \exp\Big(\frac{1}{|y|} \sum_t \log
              \frac{\pi(y_t|x, y_{<t})}{\sum_v \pi(v|x, y_{<t})^2}\Big)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`; no gradient flows through w. Source: Zhou et al. 2024, WPO (arXiv
    2406.11827), equation 2, and TRL 1.16's ``use_weighting`` with the loss type ``sigmoid``; its bound on w, and its
    form for any other objective, are those of :func:`~dpojax.losses.wpo_weighted`.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens; the policy's sums of
        ``log sum_v p(v)^2``.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``.

    >>> import jax.numpy as jnp
    >>> from dpojax.types import Sides
    >>> n, half = jnp.array([2]), 2 * jnp.log(jnp.array([0.5]))
    >>> p = PairLogps(half, half, n, n, squares=Sides(half, 2 * half))  # weights 1 and 2
    >>> r = PairLogps(half - 1, half + 1, n, n)
    >>> print(f"{wpo(p, r, beta=0.5)[0]:.6f}")  # 2 * log(1 + exp(-1))
    0.626523
    """
    return wpo_weighted(functools.partial(sigmoid, beta=beta))(policy, ref)
