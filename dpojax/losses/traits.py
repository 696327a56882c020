"""What an objective reads beyond sums of log-probabilities, declared beside it, so that a run can provide it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from dpojax.types import STATISTICS

Objective = Callable[..., Any]
"""``(policy, ref) -> [B]``, one loss per pair (or per labelled completion), unreduced."""

F = TypeVar("F", bound=Callable)

OF_REFERENCE = frozenset({"tokens", "kl"})
"""Statistics for which the reference's single tokens or distributions are needed, not its sums alone."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """An objective's declaration.

    Attributes:
      on: what it is of: "pairs" (:class:`~dpojax.types.PairLogps`), "labels"
        (:class:`~dpojax.types.LabelledLogps`), or "scores": pairs of a reward model's scores in place of
        log-probabilities.
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
        """The statistics of completions that it reads beside sums."""
        return self.reads & frozenset(STATISTICS)

    @property
    def needs_live_reference(self) -> bool:
        """Whether sums of the reference's log-probabilities, which can be cached, are not enough."""
        return bool(self.reads & OF_REFERENCE)

    @property
    def needs_forward_pass(self) -> bool:
        """Whether it cannot be computed from sums of log-probabilities alone, even of held-out data."""
        return bool(self.statistics) or "key" in self.reads or self.on == "scores"

    def __or__(self, other: "Traits") -> "Traits":
        """Of an objective made of two of one kind."""
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
    """A decorator that gives an objective its :class:`Traits`; one without is taken to need sums alone.

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
    """An objective's declaration, also through ``functools.partial``."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return getattr(objective, "traits", Traits())


def same_rows(*sums: Any) -> None:
    """Refuse arrays that would broadcast: what is compared must be of the same pairs.

    Raises:
      ValueError: the shapes differ.
    """
    if len({x.shape for x in sums}) > 1:
        shapes = ", ".join(str(x.shape) for x in sums)
        raise ValueError(f"policy and reference, chosen and rejected must be of the same pairs; their shapes: {shapes}")
