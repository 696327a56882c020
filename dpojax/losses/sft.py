"""Imitation of the chosen completion, and the baselines that the DPO paper makes of it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.traits import traits
from dpojax.types import PairLogps


@traits(reference=False, lengths=True, divergence=True)
def sft(policy: PairLogps, ref: PairLogps) -> Float[Array, " B"]:
    r"""Negative log-probability per chosen token; the reference and the rejected side are not read.

    .. math:: -\frac{1}{\bar n} \log \pi(y_w|x), \qquad \bar n = \frac{1}{B} \sum_i |y_w^{(i)}|

    Dividing by the batch's mean length makes the mean over pairs the mean over the batch's chosen tokens, which is
    TRL's loss type of this name. Source: cross-entropy; added to :func:`~dpojax.losses.sigmoid` it is an NLL term as in
    Pang et al. 2024 (arXiv 2404.19733), equation 1, which normalises by each pair's own length instead
    (:func:`~dpojax.losses.rpo`).

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
        mean_len = jnp.mean(policy.chosen_len.astype(policy.chosen.dtype))
    return -policy.chosen / jnp.maximum(mean_len, 1.0)


@traits(reference=False)
def preferred_ft(policy: PairLogps, ref: PairLogps) -> Float[Array, " B"]:
    r"""The paper's Preferred-FT baseline: negative log-likelihood of the chosen completion, whole.

    .. math:: -\log \pi(y_w|x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 6, "Methods". :func:`sft` is the same per token.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats.
      ref: unused.

    Returns:
      One loss a pair, ``[B]``, nats.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> preferred_ft(p, p).tolist()
    [10.0]
    """
    return -policy.chosen


@traits(reference=False)
def unlikelihood(policy: PairLogps, ref: PairLogps, *, alpha: float = 1.0) -> Float[Array, " B"]:
    r"""The paper's unlikelihood baseline: raise the chosen completion's log-probability, lower the rejected one's.

    .. math:: -\log \pi(y_w|x) + \alpha \log \pi(y_l|x)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 6, "Methods". Not the token-level loss of Welleck et al.
    2019 (arXiv 1908.04319), which is ``-log(1 - p)`` of each token. There is no lower bound, and policies trained with
    it degenerate, as the paper's table 3 shows.

    Args:
      policy: sums of log-probabilities, ``[B]`` a field, nats.
      ref: unused.
      alpha: weight of the rejected side, in [0, 1]; 0 is :func:`preferred_ft`.

    Returns:
      One loss a pair, ``[B]``, nats.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> unlikelihood(p, p, alpha=0.5).tolist()  # 10 - 6
    [4.0]
    """
    return -policy.chosen + alpha * policy.rejected
