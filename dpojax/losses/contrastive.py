"""Pairs as noise-contrastive estimation and as matching of two distributions over the pair."""

import math

import jax
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits(divergence=True)
def exo_pair(
    policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, label_smoothing: float = 1e-3
) -> Float[Array, " B"]:
    r"""Efficient exact optimization on pairs: the reverse KL from smoothed labels, where DPO has the forward one.

    .. math:: \sigma(\beta h) \log \frac{\sigma(\beta h)}{1 - \epsilon}
              + \sigma(-\beta h) \log \frac{\sigma(-\beta h)}{\epsilon}

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Ji et al. 2024, EXO (arXiv 2402.00856), equation 16.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: the paper's beta_pi, strength of the KL penalty, above 0.
      label_smoothing: epsilon, above 0 and below 1; the paper takes 1e-3.

    Returns:
      One loss a pair, ``[B]``; 0 at its minimum, where ``sigma(beta h) = 1 - epsilon``.

    Raises:
      ValueError: ``label_smoothing`` outside its range.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{exo_pair(p, p, label_smoothing=0.1)[0]:.6f}")  # (log(0.5 / 0.9) + log(0.5 / 0.1)) / 2
    0.510826
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair: label_smoothing {label_smoothing} must be above 0 and below 1")
    chosen, rejected = log_ratios(policy, ref)
    logits = beta * (chosen - rejected)
    win = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log1p(-label_smoothing))
    return win + jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(label_smoothing))


@traits()
def nca_pair(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Noise-contrastive alignment on pairs: absolute rewards, so that the chosen likelihood is kept up.

    .. math:: -\log \sigma(r_w) - \tfrac12 \log \sigma(-r_w) - \tfrac12 \log \sigma(-r_l), \qquad
              r = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Chen et al. 2024, "Noise contrastive alignment of language models with explicit rewards" (arXiv
    2402.05369), NCA for pairs (their appendix's pseudocode); TRL's loss type of this name.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly ``2 log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{nca_pair(p, r, beta=1.0)[0]:.6f}")  # 0.313262 + 1.313262 / 2 + 0.313262 / 2
    1.126523
    """
    chosen, rejected = (beta * x for x in log_ratios(policy, ref))
    pulled = jax.nn.log_sigmoid(chosen)
    return -pulled - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)
