"""The DPO loss and its hinge sibling: classification losses on the difference of log-ratios."""

import jax
from jaxtyping import Array, Float

from dpojax.types import PairLogps


def log_ratios(policy: PairLogps, ref: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    r"""The log-ratios :math:`\log \pi(y|x) - \log \pi_\mathrm{ref}(y|x)` of the chosen and rejected completions.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), the terms of equation 7.

    Args:
      policy: sums of log-probabilities under the policy, ``[B]`` a field, nats.
      ref: the same under the reference.

    Returns:
      ``(chosen, rejected)``, each ``[B]``, nats.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> [x.tolist() for x in log_ratios(p, r)]
    [[1.0], [-1.0]]
    """
    return policy.chosen - ref.chosen, policy.rejected - ref.rejected


def implicit_rewards(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    r"""The reward that the policy implies, up to a function of the prompt that cancels within a pair.

    .. math:: \hat r(x, y) = \beta \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without its ``beta log Z(x)``.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.

    Returns:
      ``(chosen, rejected)``, each ``[B]``, in the reward's units.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> [x.tolist() for x in implicit_rewards(p, r, beta=0.5)]
    [[0.5], [-0.5]]
    """
    chosen, rejected = log_ratios(policy, ref)
    return beta * chosen, beta * rejected


def sigmoid(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    r"""The DPO loss: negative log-likelihood of the preference under Bradley-Terry.

    .. math:: -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h), \qquad
              h = \log \frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)} - \log \frac{\pi(y_l|x)}{\pi_\mathrm{ref}(y_l|x)}

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With ``label_smoothing`` epsilon it is conservative
    DPO, which takes a label to be flipped with probability epsilon (Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO", equation 3).

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: strength of the KL penalty, above 0.
      label_smoothing: epsilon, in [0, 0.5).

    Returns:
      One loss a pair, ``[B]``; exactly ``log 2`` where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{sigmoid(p, r, beta=0.5)[0]:.6f}")  # log(1 + exp(-1))
    0.313262
    """
    chosen, rejected = log_ratios(policy, ref)
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def hinge(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Float[Array, " B"]:
    r"""Hinge loss on the log-ratio margin: nothing is asked beyond a margin of ``1 / beta`` nats.

    .. math:: \max(0,\; 1 - \beta h)

    with ``h`` as in :func:`sigmoid`. Source: Zhao et al. 2023, SLiC-HF (arXiv 2305.10425), equation 1, and Liu et
    al. 2024, RSO (arXiv 2309.06657), which normalises by the reference as here; ``1/beta`` is the margin delta.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats.
      beta: inverse of the margin, above 0.

    Returns:
      One loss a pair, ``[B]``; exactly 1 where policy and reference agree.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> hinge(p, r, beta=0.25).tolist()  # 1 - 0.25 * 2
    [0.5]
    """
    chosen, rejected = log_ratios(policy, ref)
    return jax.nn.relu(1.0 - beta * (chosen - rejected))
