"""Objectives made of objectives."""

from collections.abc import Callable

from jaxtyping import Array, Float

from dpojax.types import PairLogps

Objective = Callable[[PairLogps, PairLogps], Float[Array, " B"]]
"""(policy, reference) -> one loss per pair, unreduced."""


def weighted_sum(*terms: tuple[float, Objective]) -> Objective:
    r"""The objective :math:`\sum_i w_i\, \ell_i`, itself an objective.

    Source: linearity; with an NLL term it is the loss of Pang et al. 2024 (arXiv 2404.19733), equation 1, up to that
    term's normalisation, and TRL's ``loss_type`` and ``loss_weights`` as lists.

    Args:
      *terms: ``(weight, objective)`` pairs, at least one. Bind an objective's options with ``functools.partial``.

    Returns:
      An objective ``(policy, ref) -> [B]``.

    Raises:
      ValueError: without terms.

    >>> import jax.numpy as jnp
    >>> from functools import partial
    >>> from dpojax.losses import ipo, sft
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> weighted_sum((1.0, partial(ipo, beta=0.5)), (0.5, sft))(p, r).tolist()  # 0.25 + 0.5 * 2.5
    [1.5]
    """
    if not terms:
        raise ValueError("weighted_sum needs at least one (weight, objective) term")

    def objective(policy: PairLogps, ref: PairLogps) -> Float[Array, " B"]:
        return sum(weight * loss(policy, ref) for weight, loss in terms)  # type: ignore[return-value]

    return objective
