"""Objectives of each side by itself, so that they determine whether the chosen likelihood rises or falls."""

import jax
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits()
def bco_pair(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Binary classifier optimization on pairs, without reward shift: is a completion a chosen one?

    .. math:: -\log \sigma(r_w) - \log \sigma(-r_l), \qquad r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Jung et al. 2024, BCO (arXiv 2404.04656), theorem 1's binary cross-entropy, with delta = 0 as in TRL 1.16's
    loss type of this name; :func:`~dpojax.losses.bco` has the shift.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly ``2 log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{bco_pair(p, r, beta=1.0)[0]:.6f}")  # 2 * 0.313262
    0.626523
    """
    chosen, rejected = (beta * x for x in log_ratios(policy, ref))
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


@traits()
def apo_zero(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Anchored preference optimization, zero: the chosen likelihood rises, the rejected one falls.

    .. math:: 1 - \sigma(r_w) + \sigma(r_l), \qquad r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    For data whose chosen completions are better than the model's own. Source: D'Oosterlinck et al. 2024, APO (arXiv
    2408.06266), equation 7.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``, in (0, 2); exactly 1 where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{apo_zero(p, r, beta=1.0)[0]:.6f}")  # 2 * sigmoid(-1)
    0.537883
    """
    chosen, rejected = (beta * x for x in log_ratios(policy, ref))
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


@traits()
def apo_down(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Anchored preference optimization, down: both likelihoods fall, the rejected one more.

    .. math:: \sigma(r_w) + 1 - \sigma(r_w - r_l), \qquad r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    For data whose chosen completions are worse than the model's own. Source: D'Oosterlinck et al. 2024, APO (arXiv
    2408.06266), equation 8.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``, in (0, 2); exactly 1 where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-11.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{apo_down(p, r, beta=1.0)[0]:.6f}")  # 0.5 + sigmoid(-1)
    0.768941
    """
    chosen, rejected = (beta * x for x in log_ratios(policy, ref))
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
