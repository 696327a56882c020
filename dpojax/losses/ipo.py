"""Squared losses, which aim at a finite log-ratio: identity preference optimization and self-play."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios, log_ratios_per_token
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits(divergence=True, lengths=True)
def ipo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, length_normalize: bool = True) -> Float[Array, " B"]:
    r"""IPO: regress the margin of log-ratios onto ``1 / (2 beta)``.

    .. math:: \left(h - \frac{1}{2\beta}\right)^2, \qquad
              h = \frac{1}{|y_w|}\log \frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)}
                - \frac{1}{|y_l|}\log \frac{\pi(y_l|x)}{\pi_\mathrm{ref}(y_l|x)}

    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17, whose tau is ``beta`` here. The paper writes sums; its
    authors average over tokens in practice, and so does TRL. ``length_normalize=False`` leaves out the two
    ``1/|y|``, which is the paper's and the original DPO repository's form.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0; the margin aimed at is ``1 / (2 beta)``.
      length_normalize: average over a completion's tokens before comparing.

    Returns:
      One loss a pair, ``[B]``; exactly ``1 / (4 beta^2)`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> ipo(p, r, beta=0.5).tolist()  # (2 / 4 - 1) ** 2
    [0.25]
    >>> ipo(p, r, beta=0.5, length_normalize=False).tolist()  # (2 - 1) ** 2
    [1.0]
    """
    chosen, rejected = (log_ratios_per_token if length_normalize else log_ratios)(policy, ref)
    # Within what float32 can square; another divergence's scores may lie beyond.
    return jnp.square(jnp.clip(chosen - rejected - 1 / (2 * beta), -1e18, 1e18))


@traits()
def sppo_hard(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1) -> Float[Array, " B"]:
    r"""Self-play preference optimization with hard labels: regress each log-ratio onto plus or minus half of 1/beta.

    .. math:: \left(u_w - \frac{1}{2\beta}\right)^2 + \left(u_l + \frac{1}{2\beta}\right)^2, \qquad
              u = \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Wu et al. 2024, SPPO (arXiv 2405.00675), equation 4.7 with the win rate set to 1 for the chosen and 0 for
    the rejected completion; the paper's eta is ``1 / beta``. TRL's loss type of this name.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0; the log-ratios aimed at are ``+-1 / (2 beta)``.

    Returns:
      One loss a pair, ``[B]``; exactly ``1 / (2 beta^2)`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> sppo_hard(p, r, beta=0.25).tolist()  # (1 - 2) ** 2 + (-1 + 2) ** 2
    [2.0]
    """
    chosen, rejected = log_ratios(policy, ref)
    return jnp.square(chosen - 1 / (2 * beta)) + jnp.square(rejected + 1 / (2 * beta))
