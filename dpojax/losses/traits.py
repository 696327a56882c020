"""What an objective declares that it reads beyond sums of log-probabilities, so that a run can provide it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Array, Float

from dpojax.types import COMPARED_DISTRIBUTIONS, REFERENCE_STATISTICS, STATISTICS

Objective: TypeAlias = Callable[..., Any]
"""``(policy, ref) -> [B]``, one loss per pair (or per labelled completion), unreduced."""

Beta: TypeAlias = float | np.floating | Float[Array, ""]
"""A number, or a scalar array that a compiled step takes as an input; no objective may branch on it."""

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Traits:
    """What an objective reads and allows.

    Attributes:
      on: what it judges: "pairs" (:class:`~dpojax.types.PairLogps`), "labels"
        (:class:`~dpojax.types.LabelledLogps`), or "scores" (pairs of a reward model's scores in place of
        log-probabilities).
      reference: it reads the reference's log-probabilities.
      lengths: it reads the completions' lengths.
      reads: the optional fields that it needs: statistics (:data:`~dpojax.types.STATISTICS`), ``margin``, ``weight``,
        ``key``; or ``mismatched``, of labelled completions.
      batch: a pair's loss depends on the other pairs of its batch.
      divergence: only differences of log-ratios matter to it, so that another f-divergence may replace the reverse KL.
      per_token: the rewards that it implies are per token.
      running: by objective, ``update(policy, ref, old) -> new`` of its running statistics; ``old`` is None before the
        first step.
    """

    on: Literal["pairs", "labels", "scores"] = "pairs"
    reference: bool = True
    lengths: bool = False
    reads: frozenset[str] = frozenset()
    batch: bool = False
    divergence: bool = False
    per_token: bool = False
    running: dict[str, Callable] = dataclasses.field(default_factory=dict)

    @property
    def statistics(self) -> frozenset[str]:
        """The statistics of the policy's completions that it reads in addition to sums."""
        return self.reads & frozenset(STATISTICS)

    @property
    def reference_statistics(self) -> frozenset[str]:
        """The statistics of the reference's completions that it reads in addition to sums."""
        return self.reads & REFERENCE_STATISTICS

    @property
    def compares_distributions(self) -> bool:
        """Whether it needs the reference's distributions over the whole vocabulary."""
        return bool(self.reads & COMPARED_DISTRIBUTIONS)

    @property
    def needs_live_reference(self) -> bool:
        """Whether sums of the reference's log-probabilities, which can be cached, are not enough."""
        return bool(self.reference_statistics) or self.compares_distributions

    @property
    def needs_forward_pass(self) -> bool:
        """Whether it cannot be computed from sums of log-probabilities alone, even of held-out data."""
        return bool(self.statistics) or "key" in self.reads or self.on == "scores"

    def __or__(self, other: "Traits") -> "Traits":
        """The traits of a sum of two objectives of one kind."""
        return Traits(
            on=self.on,
            reference=self.reference or other.reference,
            lengths=self.lengths or other.lengths,
            reads=self.reads | other.reads,
            batch=self.batch or other.batch,
            divergence=self.divergence and other.divergence,
            per_token=self.per_token and other.per_token,
            running=self.running | other.running,
        )


def traits(*reads: str, **declared: Any) -> Callable[[F], F]:
    """A decorator that gives an objective its :class:`Traits`; an objective without them reads sums and lengths.

    >>> @traits("tokens", lengths=True)
    ... def mine(policy, ref, *, beta=0.1): ...
    >>> sorted(traits_of(mine).reads), traits_of(functools.partial(mine, beta=0.2)).lengths
    (['tokens'], True)
    """
    declaration = Traits(reads=frozenset(reads), **declared)

    def declare(objective: F) -> F:
        objective.traits = declaration  # type: ignore[attr-defined]
        return objective

    return declare


def traits_of(objective: Objective) -> Traits:
    """The traits of an objective, also of one whose options ``functools.partial`` has bound."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return getattr(objective, "traits", Traits())


def check_same_shape(*sums: Any) -> None:
    """Refuse arrays that would broadcast: what is compared must be of the same pairs.

    Raises:
      ValueError: the shapes differ.
    """
    if len({x.shape for x in sums}) > 1:
        shapes = ", ".join(str(x.shape) for x in sums)
        raise ValueError(f"policy and reference, chosen and rejected must be of the same pairs; their shapes: {shapes}")
