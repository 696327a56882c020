"""Sums of objectives that have a name."""

import functools

from jaxtyping import Array, Float

from dpojax.losses.anchored import bco_pair
from dpojax.losses.compose import weighted_sum
from dpojax.losses.dpo import sigmoid
from dpojax.losses.sft import sft
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits(lengths=True)
def mpo(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: Beta = 0.1,
    sigmoid_weight: float = 0.8,
    bco_weight: float = 0.2,
    sft_weight: float = 1.0,
) -> Float[Array, " B"]:
    r"""Mixed preference optimization: a sum of a preference loss, a quality loss and a generation loss.

    .. math:: w_p\, \ell_\mathrm{sigmoid} + w_q\, \ell_\mathrm{bco\_pair} + w_g\, \ell_\mathrm{sft}

    of :func:`~dpojax.losses.sigmoid`, :func:`~dpojax.losses.bco_pair` and :func:`~dpojax.losses.sft`. Source: Wang et
    al. 2024, MPO (arXiv 2411.10442), with the weights of the authors' training script (OpenGVLab/InternVL), and TRL's
    three loss types together. In the authors' code the BCO term has a reward shift, the running mean of all rewards,
    which is 0 here as in TRL 1.16; the paper's section 4.1 divides the last term by each pair's own length, where that
    code, TRL and ``sft`` take the mean over the batch's tokens. Not the MPO of other papers of that abbreviation.

    Args:
      policy, ref: sums of log-probabilities, ``[B]`` a field, nats; lengths in tokens.
      beta: strength of the KL penalty, above 0, of the first two terms.
      sigmoid_weight, bco_weight, sft_weight: of the terms.

    Returns:
      One loss a pair, ``[B]``.

    >>> import jax.numpy as jnp
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-11.0]), n, n)
    >>> print(f"{mpo(p, r, beta=1.0)[0]:.6f}")  # 0.8 * 0.126928 + 0.2 * 2 * 0.313262 + 10 / 4
    2.726847
    """
    terms = (
        (sigmoid_weight, functools.partial(sigmoid, beta=beta)),
        (bco_weight, functools.partial(bco_pair, beta=beta)),
        (sft_weight, sft),
    )
    return weighted_sum(*terms)(policy, ref)
