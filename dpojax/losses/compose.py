"""Objectives made of objectives: each wrapper here returns an objective again."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.traits import Beta, Objective, Traits, traits_of
from dpojax.types import COMPARED_DISTRIBUTIONS, REFERENCE_STATISTICS, STATISTICS, Logps, PairLogps, Sides

Field = TypeVar("Field")

EXPONENT = 43.0  # exp of it, squared, is still a float32
DIVERGENCE_EXPONENT = 80.0  # as in TRL


def open_options(objective: Objective) -> frozenset[str]:
    """The names of an objective's options that ``functools.partial`` has not bound."""
    takes = list(inspect.signature(objective).parameters)[2:]  # without policy and ref
    return frozenset(takes) - set(objective.keywords if isinstance(objective, functools.partial) else ())


def with_options(objective: Objective, **options: Any) -> Objective:
    """The objective with those of the options bound that it takes and that are not bound yet."""
    return functools.partial(objective, **{k: v for k, v in options.items() if k in open_options(objective)})


def takes_beta(objective: Objective) -> bool:
    """Whether an objective, or one that it is made of, has a ``beta`` that is not bound."""
    return "beta" in open_options(objective)


def at_beta(objective: Objective, policy: Any, ref: Any, beta: Beta | None) -> Float[Array, " B"]:
    r"""The losses of an objective at a given beta: ``[B]``.

    Objectives made of objectives pass beta on to all of these. One without a ``beta``, or with a bound one, ignores it.

    Args:
      objective: ``(policy, ref) -> [B]``, with an option ``beta`` or without.
      policy, ref: as the objective takes them.
      beta: a number, or a scalar array, which may be traced; None is the objective's own default.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge, with_weights
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([1.0]), jnp.array([0.0]), n, n, weight=jnp.array([3.0]))
    >>> zero = PairLogps(jnp.array([0.0]), jnp.array([0.0]), n, n)
    >>> mixed = weighted_sum((1.0, with_weights(hinge)), (1.0, functools.partial(hinge, beta=0.25)))
    >>> at_beta(mixed, p, zero, jnp.float32(0.5)).tolist()  # 3 * (1 - 0.5) + (1 - 0.25)
    [2.25]
    """
    if beta is None or not takes_beta(objective):
        return objective(policy, ref)
    return objective(policy, ref, beta=beta)


def with_traits(
    losses: Callable[[Any, Any, Beta | None], Any], traits: Traits, *inner: Objective, **changed: Any
) -> Objective:
    """An objective of ``losses(policy, ref, beta)`` that carries these traits.

    Args:
      losses: the computation; ``beta`` is None where none is given.
      traits: of what it is made of.
      *inner: the objectives that it is made of. It takes ``beta`` where one of them does.
      **changed: traits that differ.
    """
    if any(map(takes_beta, inner)):

        def objective(policy: Any, ref: Any, *, beta: Beta | None = None) -> Any:
            return losses(policy, ref, beta)
    else:

        def objective(policy: Any, ref: Any) -> Any:  # type: ignore[misc]
            return losses(policy, ref, None)

    objective.traits = dataclasses.replace(traits, **changed)  # type: ignore[attr-defined]
    return objective


def require(field: Field | None, name: str) -> Field:
    """An optional field of log-probabilities, which must be there.

    Raises:
      ValueError: it is not.
    """
    if field is None:
        raise ValueError(f"the objective reads {name!r}, which these log-probabilities do not carry")
    return field


def _traits_of_pairs(name: str, objective: Objective) -> Traits:
    """The traits of an objective.

    Raises:
      ValueError: it is of labelled completions, not of pairs.
    """
    if traits_of(objective).on == "labels":
        raise ValueError(f"{name}: the objective is of labelled completions; give one of pairs")
    return traits_of(objective)


def weighted_sum(*terms: tuple[float, Objective]) -> Objective:
    r"""The objective :math:`\sum_i w_i\, \ell_i`, itself an objective.

    Source: linearity; with an NLL term it is the loss of Pang et al. 2024 (arXiv 2404.19733), equation 1, up to that
    term's normalisation, and TRL's ``loss_type`` and ``loss_weights`` as lists.

    Args:
      *terms: ``(weight, objective)`` pairs, at least one. Bind an objective's options with ``functools.partial``.

    Returns:
      An objective ``(policy, ref) -> [B]``.

    Raises:
      ValueError: without terms, or with objectives of pairs and of labelled completions together.

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
    declared = [traits_of(objective) for _, objective in terms]
    if len({traits.on for traits in declared}) > 1:
        raise ValueError("weighted_sum: its terms must be all of pairs, all of labelled completions, or all of rewards")

    def losses(policy: Logps, ref: Logps, beta: Beta | None) -> Float[Array, " B"]:
        total: Any = sum(weight * at_beta(objective, policy, ref, beta) for weight, objective in terms)
        return total

    return with_traits(losses, functools.reduce(Traits.__or__, declared), *(objective for _, objective in terms))


def _bounded_exp(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """The exponential of at most DIVERGENCE_EXPONENT: beyond it float32, or what is made of it, would overflow."""
    return jnp.exp(jnp.minimum(x, DIVERGENCE_EXPONENT))


DIVERGENCES: dict[str, Callable[[float], Callable[[Array], Array]]] = {
    "reverse_kl": lambda alpha: lambda u: u,
    "forward_kl": lambda alpha: lambda u: 1 - _bounded_exp(-u),
    "js_divergence": lambda alpha: lambda u: math.log(2) + jax.nn.log_sigmoid(u),
    "alpha_divergence": lambda alpha: lambda u: (_bounded_exp((alpha - 1) * u) - 1) / (alpha - 1),
}


def with_divergence(objective: Objective, kind: str, *, alpha: float = 0.5) -> Objective:
    r"""The objective under another f-divergence from the reference: log-ratios become scores ``f'(pi / pi_ref)``.

    .. math:: u = \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}, \qquad
        u \to \begin{cases} u & \text{reverse KL} \\ 1 - e^{-u} & \text{forward KL} \\
        \log 2 + \log \sigma(u) & \text{Jensen-Shannon} \\ (e^{(\alpha - 1) u} - 1) / (\alpha - 1) & \alpha
        \end{cases}

    Source: Wang et al. 2023, f-DPO (arXiv 2309.16240), theorem 1 and table 1; the alpha divergence in the form of
    TRL 1.16, which differs by a factor from the paper's and is the reverse KL in the limit of alpha to 1. The paper's
    constant ``f'`` terms cancel within a pair, which is why only objectives of the difference allow it. Exponents
    above 80 count as 80, so that float32 does not overflow, as in TRL; a completion beyond has no gradient.

    Args:
      objective: of the difference of log-ratios (its traits declare ``divergence``).
      kind: ``reverse_kl``, ``forward_kl``, ``js_divergence`` or ``alpha_divergence``; TRL's ``f_divergence_type``.
      alpha: of the alpha divergence; TRL's ``f_alpha_divergence_coef``.

    Raises:
      ValueError: no such divergence, or an objective that does not allow it.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([0.0]), jnp.array([0.0]), n, n)
    >>> r = PairLogps(jnp.array([0.0]), jnp.array([-jnp.log(2.0)]), n, n)  # ratios 1 and 1/2 ... 1 - 1 and 1 - 1/2
    >>> print(f"{with_divergence(hinge, 'forward_kl')(p, r)[0]:.4f}")  # 1 - 0.1 * (0 - 0.5)
    1.0500
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"with_divergence: no divergence {kind!r}; use one of {', '.join(DIVERGENCES)}")
    if not traits_of(objective).divergence:
        raise ValueError("with_divergence: the objective is not one of differences of log-ratios, and allows none")
    score = DIVERGENCES["reverse_kl" if abs(alpha - 1) < 1e-6 and kind == "alpha_divergence" else kind](alpha)

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        return at_beta(objective, dataclasses.replace(policy, divergence=score), ref, beta)

    return with_traits(losses, traits_of(objective), objective, divergence=False)


def swapped(pair: PairLogps) -> PairLogps:
    """The pairs with chosen and rejected exchanged, as if every label were flipped."""
    sides: dict[str, Any] = {"chosen": pair.rejected, "rejected": pair.chosen}
    sides |= {"chosen_len": pair.rejected_len, "rejected_len": pair.chosen_len}
    sides |= {name: Sides(x.rejected, x.chosen) for name in STATISTICS if (x := getattr(pair, name)) is not None}
    margin = None if pair.margin is None else -pair.margin
    return dataclasses.replace(pair, **sides, margin=margin, mean_chosen_len=None)


def with_label_smoothing(objective: Objective, label_smoothing: float) -> Objective:
    r"""The expectation of an objective over labels that are flipped with probability epsilon.

    .. math:: (1 - \epsilon)\, \ell(y_w, y_l) + \epsilon\, \ell(y_l, y_w)

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", equation 3, there for the
    sigmoid: conservative DPO.

    Args:
      objective: of pairs.
      label_smoothing: epsilon, from 0 to below 0.5.

    Raises:
      ValueError: epsilon outside its range, or an objective of labelled completions.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([2.0]), jnp.array([0.0]), n, n)
    >>> r = PairLogps(jnp.array([0.0]), jnp.array([0.0]), n, n)
    >>> print(f"{with_label_smoothing(hinge, 0.25)(p, r)[0]:.4f}")  # 0.75 * (1 - 0.2) + 0.25 * (1 + 0.2)
    0.9000
    """
    traits = _traits_of_pairs("with_label_smoothing", objective)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"with_label_smoothing: epsilon {label_smoothing} must be from 0 to below 0.5")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        flipped = at_beta(objective, swapped(policy), swapped(ref), beta)
        return (1 - label_smoothing) * at_beta(objective, policy, ref, beta) + label_smoothing * flipped

    return with_traits(losses, traits, objective)


def per_token(pair: PairLogps) -> PairLogps:
    """The pairs with the mean of each completion's token log-probabilities as its sum, and lengths of one token."""
    # A padding row has no token and stays so.
    lengths = {side: getattr(pair, f"{side}_len") for side in ("chosen", "rejected")}
    divisor = {side: jnp.maximum(n, 1).astype(pair.chosen.dtype) for side, n in lengths.items()}
    fields: dict[str, Any] = {side: getattr(pair, side) / divisor[side] for side in divisor}
    fields |= {f"{side}_len": jnp.minimum(n, 1) for side, n in lengths.items()}
    return dataclasses.replace(pair, **fields, mean_chosen_len=None)


def length_normalized(objective: Objective) -> Objective:
    r"""The objective on log-probabilities per token: every completion counts as one token.

    .. math:: \log \pi(y|x) \to \frac{1}{|y|} \log \pi(y|x)

    for policy and reference. Source: the normalisation of Meng et al. 2024, SimPO (arXiv 2405.14734), equation 4, and
    of TRL's ``ipo`` and ``sigmoid_norm``.

    Args:
      objective: of pairs, that reads sums alone.

    Raises:
      ValueError: the objective reads single tokens, or is not of pairs of completions.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> p = PairLogps(jnp.array([-4.0]), jnp.array([-12.0]), jnp.array([4]), jnp.array([3]))
    >>> zero = PairLogps(jnp.array([0.0]), jnp.array([0.0]), jnp.array([4]), jnp.array([3]))
    >>> print(f"{length_normalized(hinge)(p, zero)[0]:.4f}")  # 1 - 0.1 * (-1 + 4)
    0.7000
    """
    traits = _traits_of_pairs("length_normalized", objective)
    if traits.statistics:
        raise ValueError("length_normalized: the objective reads single tokens, which have no length")
    if traits.on == "scores":
        raise ValueError("length_normalized: the objective is of rewards, which are not sums over tokens")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        return at_beta(objective, per_token(policy), per_token(ref), beta)

    return with_traits(losses, traits, objective, lengths=True)


def reference_free(objective: Objective) -> Objective:
    r"""The objective with a uniform reference: its log-probabilities count as equal within a pair.

    .. math:: \pi_\mathrm{ref}(y|x) \to 1

    Source: the ``reference_free`` option of the original DPO repository and of earlier versions of TRL.

    Args:
      objective: of pairs.

    Raises:
      ValueError: the objective reads the reference's distributions, or no reference, or is not of pairs.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([-10.0]), jnp.array([-12.0]), n, n)
    >>> r = PairLogps(jnp.array([-11.0]), jnp.array([-19.0]), n, n)
    >>> print(f"{reference_free(hinge)(p, r)[0]:.4f}")  # 1 - 0.1 * 2
    0.8000
    """
    traits = _traits_of_pairs("reference_free", objective)
    if not traits.reference:
        raise ValueError("reference_free: the objective reads no reference already; leave the wrapper out")
    if traits.compares_distributions:
        raise ValueError("reference_free: the objective compares whole distributions with the reference's")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        return at_beta(objective, policy, without_reference(policy), beta)

    return with_traits(losses, traits, objective, reference=False)


def without_reference(policy: PairLogps) -> PairLogps:
    """A uniform reference's log-probabilities of the policy's completions: all zero."""
    read = {name: getattr(policy, name) for name in ("chosen", "rejected", *sorted(REFERENCE_STATISTICS))}
    return dataclasses.replace(policy, **jax.tree.map(jnp.zeros_like, read))


def with_weights(objective: Objective) -> Objective:
    r"""The objective times the weight that the data gives each pair (the field ``weight`` of its rows).

    .. math:: w\, \ell(y_w, y_l)

    Source: importance weighting. The mean over pairs still divides by their number, so weights of mean 1 keep the
    loss's scale.

    Args:
      objective: of pairs.

    Raises:
      ValueError: an objective of labelled completions.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([2.0]), jnp.array([0.0]), n, n, weight=jnp.array([3.0]))
    >>> zero = PairLogps(jnp.array([0.0]), jnp.array([0.0]), n, n)
    >>> print(f"{with_weights(hinge)(p, zero)[0]:.4f}")  # 3 * (1 - 0.2)
    2.4000
    """
    traits = _traits_of_pairs("with_weights", objective)

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        return require(policy.weight, "weight") * at_beta(objective, policy, ref, beta)

    return with_traits(losses, traits, objective, reads=traits.reads | {"weight"})


def with_margins(objective: Objective, scale: float = 1.0) -> Objective:
    r"""The objective with its log-ratio margin lowered by the pair's margin in the data (the rows' ``margin``).

    .. math:: h \to h - s\, m

    so that a pair of a greater margin needs a greater log-ratio margin. Source: Touvron et al. 2023, Llama 2 (arXiv
    2307.09288), equation 2, there for reward models. The margin times ``scale`` is in nats; for the reward's units,
    take ``1 / beta`` for the scale. Around another divergence it moves the log-ratio, not its score.

    Args:
      objective: of pairs, that reads sums.
      scale: nats for a unit of margin.

    Raises:
      ValueError: the objective makes its sums anew of single tokens, or is not of pairs.

    >>> import jax.numpy as jnp
    >>> from dpojax.losses import hinge
    >>> n = jnp.array([4])
    >>> p = PairLogps(jnp.array([5.0]), jnp.array([0.0]), n, n, margin=jnp.array([1.5]))
    >>> zero = PairLogps(jnp.array([0.0]), jnp.array([0.0]), n, n)
    >>> print(f"{with_margins(hinge, 2.0)(p, zero)[0]:.4f}")  # 1 - 0.1 * (5 - 3)
    0.8000
    """
    traits = _traits_of_pairs("with_margins", objective)
    if traits.statistics - COMPARED_DISTRIBUTIONS:  # which the shift leaves out
        raise ValueError("with_margins: the objective reads single tokens; put with_margins around what it wraps")

    def losses(policy: PairLogps, ref: PairLogps, beta: Beta | None) -> Float[Array, " B"]:
        chosen = policy.chosen - scale * require(policy.margin, "margin")
        return at_beta(objective, dataclasses.replace(policy, chosen=chosen), ref, beta)

    return with_traits(losses, traits, objective, reads=traits.reads | {"margin"}, divergence=False)
