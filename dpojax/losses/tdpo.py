"""Token-level DPO: with each token's KL divergence from the reference, over the whole vocabulary."""

import jax
from jaxtyping import Array, Float

from dpojax.losses.compose import require
from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


def _terms(policy: PairLogps, ref: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """The difference of log-ratios, and the chosen and the rejected completion's divergence."""
    chosen, rejected = log_ratios(policy, ref)
    return chosen - rejected, *require(policy.kl, "kl")


@traits("kl")
def tdpo1(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Token-level DPO: to the DPO margin, the difference of the completions' sequential divergences is added.

    .. math:: -\log \sigma\big(\beta\, (h + D_w - D_l)\big), \qquad
              D = \sum_t \mathrm{KL}\big(\pi_\mathrm{ref}(\cdot|x, y_{<t}) \,\|\, \pi(\cdot|x, y_{<t})\big)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Zeng et al. 2024, TDPO (arXiv 2404.11999), its first
    method, and the authors' code (Vance0124/Token-level-Direct-Preference-Optimization) with ``if_tdpo2=false``.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; the policy's sums of the divergence.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> from dpojax.types import Sides
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n, kl=Sides(jnp.array([1.0]), jnp.array([2.0])))
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{tdpo1(p, r, beta=1.0)[0]:.6f}")  # h = 2, 2 + 1 - 2: log(1 + exp(-1))
    0.313262
    """
    margin, chosen_kl, rejected_kl = _terms(policy, ref)
    return -jax.nn.log_sigmoid(beta * (margin + chosen_kl - rejected_kl))


@traits("kl")
def tdpo2(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, alpha: float = 0.5) -> Float[Array, " B"]:
    r"""Token-level DPO of the second kind: :func:`tdpo1` with a weight, and without raising the chosen divergence.

    .. math:: -\log \sigma\big(\beta\, (h - \alpha\, (D_l - \mathrm{sg}(D_w)))\big), \qquad
              D = \sum_t \mathrm{KL}\big(\pi_\mathrm{ref}(\cdot|x, y_{<t}) \,\|\, \pi(\cdot|x, y_{<t})\big)

    with ``h`` as in :func:`~dpojax.losses.sigmoid`; no gradient flows through sg. Source: Zeng et al. 2024, TDPO (arXiv
    2404.11999), its second method, and the authors' code (Vance0124/Token-level-Direct-Preference-Optimization),
    whose default it is.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; the policy's sums of the divergence.
      beta: strength of the KL penalty, above 0.
      alpha: weight of the divergences, 0 or above; 0 is :func:`~dpojax.losses.sigmoid`.

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    Raises:
      ValueError: ``alpha`` below 0.

    >>> import jax.numpy as jnp
    >>> from dpojax.types import Sides
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n, kl=Sides(jnp.array([1.0]), jnp.array([3.0])))
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{tdpo2(p, r, beta=1.0)[0]:.6f}")  # h = 2, 2 - 0.5 * (3 - 1): log(1 + exp(-1))
    0.313262
    """
    if alpha < 0:
        raise ValueError(f"tdpo2: alpha {alpha} must be 0 or above")
    margin, chosen_kl, rejected_kl = _terms(policy, ref)
    return -jax.nn.log_sigmoid(beta * (margin - alpha * (rejected_kl - jax.lax.stop_gradient(chosen_kl))))
