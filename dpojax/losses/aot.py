"""Alignment by optimal transport: the batch's distributions are compared, not its pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.losses.dpo import log_ratios
from dpojax.losses.traits import Beta, check_same_shape, traits
from dpojax.types import PairLogps


def _ranked(x: Float[Array, " B"], lengths: Int[Array, " B"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The values in ascending order, those of padding rows last, and the index that sorts them."""
    order = jnp.argsort(jnp.where(lengths > 0, x, jnp.inf))
    return x[order], order


def _smoothed(delta: Float[Array, " B"], beta: Beta, label_smoothing: float) -> Float[Array, " B"]:
    logits = beta * delta
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


@traits(batch=True, lengths=True)
def aot(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    r"""Paired alignment by optimal transport: the policy's margins are pushed above the reference's, rank by rank.

    .. math:: -\log \sigma(\beta (m_{(i)} - m^\mathrm{ref}_{(i)})), \qquad
              m = \log \pi(y_w|x) - \log \pi(y_l|x)

    where (i) sorts each over the batch. Source: Melnyk et al. 2024, "Distributional preference alignment of LLMs via
    optimal transport" (arXiv 2406.05882), section 3, the paired variant with the logistic loss, smoothed as in TRL.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats. A pair without tokens is left out of the sorting.
      beta: strength of the KL penalty, above 0.
      label_smoothing: epsilon as in :func:`~dpojax.losses.sigmoid`.

    Returns:
      ``[B]``: the loss of rank i stands at the row whose policy margin has that rank.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4, 4])
    >>> p = PairLogps(jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0]), n, n)
    >>> r = PairLogps(jnp.array([0.0, 1.0]), jnp.array([0.0, 0.0]), n, n)
    >>> [f"{x:.6f}" for x in aot(p, r, beta=1.0).tolist()]  # margins 0, 2 against 0, 1: differences 0 and 1
    ['0.313262', '0.693147']
    """
    check_same_shape(policy.chosen, policy.rejected, ref.chosen, ref.rejected)
    margins, order = _ranked(policy.chosen - policy.rejected, policy.chosen_len)
    ref_margins, _ = _ranked(ref.chosen - ref.rejected, policy.chosen_len)
    losses = _smoothed(margins - ref_margins, beta, label_smoothing)
    return jnp.zeros_like(losses).at[order].set(losses)


@traits(batch=True, lengths=True)
def aot_unpaired(
    policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    r"""Unpaired alignment by optimal transport: the chosen log-ratios are pushed above the rejected ones, rank by rank.

    .. math:: -\log \sigma(\beta (u^w_{(i)} - u^l_{(i)})), \qquad
              u = \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    where (i) sorts each over the batch. Source: Melnyk et al. 2024 (arXiv 2406.05882), section 3, the unpaired variant
    with the logistic loss, smoothed as in TRL.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats. A pair without tokens is left out of the sorting.
      beta: strength of the KL penalty, above 0.
      label_smoothing: epsilon as in :func:`~dpojax.losses.sigmoid`.

    Returns:
      ``[B]``: the loss of rank i stands at the row whose chosen log-ratio has that rank.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4, 4])
    >>> p = PairLogps(jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0]), n, n)
    >>> r = PairLogps(jnp.array([0.0, 0.0]), jnp.array([0.0, 0.0]), n, n)
    >>> [f"{x:.6f}" for x in aot_unpaired(p, r, beta=1.0).tolist()]  # 0, 2 against 0, 1: differences 0 and 1
    ['0.313262', '0.693147']
    """
    chosen, rejected = log_ratios(policy, ref)
    chosen, order = _ranked(chosen, policy.chosen_len)
    rejected, _ = _ranked(rejected, policy.chosen_len)
    losses = _smoothed(chosen - rejected, beta, label_smoothing)
    return jnp.zeros_like(losses).at[order].set(losses)
