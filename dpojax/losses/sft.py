"""Plain imitation of the chosen completion."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.types import PairLogps


def sft(policy: PairLogps, ref: PairLogps) -> Float[Array, " B"]:
    r"""Negative log-probability per chosen token; the reference and the rejected side are not read.

    .. math:: -\frac{1}{\bar n} \log \pi(y_w|x), \qquad \bar n = \frac{1}{B} \sum_i |y_w^{(i)}|

    Dividing by the batch's mean length makes the mean over pairs the mean over the batch's chosen *tokens*, which is
    TRL's loss type of this name. As a whole objective it is the Preferred-FT baseline of Rafailov et al. 2023
    (arXiv 2305.18290), section 6; added to :func:`~dpojax.losses.sigmoid` it is an NLL term as in Pang et al. 2024
    (arXiv 2404.19733), equation 1, which normalises by each pair's own length instead.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      ref: unused, so that this is an objective like the others.

    Returns:
      One loss a pair, ``[B]``, nats per token.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4, 6])
    >>> p = PairLogps(jnp.array([-10.0, -5.0]), jnp.array([-12.0, -1.0]), n, n)
    >>> sft(p, p).tolist()  # their mean is 15 nats over 10 tokens
    [2.0, 1.0]
    """
    mean_len = policy.mean_chosen_len
    if mean_len is None:
        mean_len = jnp.mean(policy.chosen_len.astype(jnp.float32))
    return -policy.chosen / jnp.maximum(mean_len, 1.0)
