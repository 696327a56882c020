"""Identity preference optimization: a squared loss that keeps the log-ratio margin finite."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.dpo import log_ratios
from dpojax.types import PairLogps


def ipo(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, length_normalize: bool = True) -> Float[Array, " B"]:
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
    chosen, rejected = log_ratios(policy, ref)
    if length_normalize:
        # A completion is never empty, but a row that only fills up a batch may be.
        chosen = chosen / jnp.maximum(policy.chosen_len, 1).astype(jnp.float32)
        rejected = rejected / jnp.maximum(policy.rejected_len, 1).astype(jnp.float32)
    return jnp.square(chosen - rejected - 1 / (2 * beta))
