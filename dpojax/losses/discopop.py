"""An objective that a language model discovered."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits(divergence=True)
def discopop(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, discopop_tau: float = 0.05) -> Float[Array, " B"]:
    r"""Log-ratio modulated loss: logistic where the pair is ordered wrongly, exponential where it is ordered rightly.

    .. math:: -(1 - \sigma(\beta h / \tau)) \log \sigma(\beta h) + \sigma(\beta h / \tau)\, e^{-\beta h}

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. Source: Lu et al. 2024, DiscoPOP (arXiv 2406.08414), equation 5.
    It is not convex: it falls to 0 as h grows, and has a local minimum near ``h = 0``.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.
      discopop_tau: width of the blend in units of ``beta h``, above 0 and below 1.

    Returns:
      One loss a pair, ``[B]``; exactly ``(log 2 + 1) / 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{discopop(p, p)[0]:.6f}")
    0.846574
    """
    chosen, rejected = log_ratios(policy, ref)
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / discopop_tau)
    # One exponential: of very negative logits alone it would overflow, and its share of them is nothing.
    return logistic + jnp.exp(jax.nn.log_sigmoid(logits / discopop_tau) - logits)
