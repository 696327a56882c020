"""DPO with an offset that grows with the difference of the completions' scores in the data."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.compose import EXPONENT, require
from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits("margin", divergence=True)
def odpo(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, alpha: float = 1.0) -> Float[Array, " B"]:
    r"""DPO with an offset: the target margin of implicit rewards grows with the difference of the data's scores.

    .. math:: -\log \sigma(\beta h - \alpha \log m), \qquad m = \mathrm{score}(y_w) - \mathrm{score}(y_l) > 0

    with ``h`` as in :func:`~dpojax.losses.sigmoid`. The rows' ``margin`` is m, the difference itself; its logarithm is
    taken here, so that a margin of 1 is DPO, and the target margin grows with it. Source: Amini
    et al. 2024, ODPO (arXiv 2402.10571), the offset ``alpha f(score difference)`` with their experiments' f, the
    logarithm, as in the authors' code (rycolab/odpo). A margin below ``e^-43``, 0 and negative ones included, counts
    as ``e^-43``, where the logarithm would be infinite or undefined; such a pair has next to no gradient.
    :func:`~dpojax.losses.with_margins` takes the difference without a logarithm.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; the policy's ``margin``, in the scores' units.
      beta: strength of the KL penalty, above 0.
      alpha: weight of the offset, at least 0; the paper takes 1, and 0 is DPO.

    Returns:
      One loss a pair, ``[B]``; ``log(1 + margin^alpha)`` where policy and reference agree.

    Raises:
      ValueError: ``alpha`` below 0, or no margins.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n, margin=jnp.array([jnp.e]))
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{odpo(p, r, beta=1.0)[0]:.6f}")  # log(1 + exp(-(2 - 1)))
    0.313262
    """
    if alpha < 0:
        raise ValueError(f"odpo: alpha {alpha} must be at least 0")
    chosen, rejected = log_ratios(policy, ref)
    offset = alpha * jnp.log(jnp.maximum(require(policy.margin, "margin"), math.exp(-EXPONENT)))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - offset)
