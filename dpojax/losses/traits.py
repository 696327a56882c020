"""What an objective reads beyond sums of log-probabilities, declared beside it, so that a run can provide it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

Objective = Callable[..., Any]
"""``(policy, ref) -> [B]``, one loss per pair (or per labelled completion), unreduced."""

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Traits:
    """An objective's declaration.

    ``reference``: it reads the reference's log-probabilities. ``lengths``: it reads the completions' lengths. ``reads``
    names the optional fields of :class:`~dpojax.types.PairLogps` that it needs, without a side's prefix: ``tokens``,
    ``squares``, ``kl``, ``margin``, ``weight``, ``key``; or ``mismatched``, of
    :class:`~dpojax.types.LabelledLogps`. ``batch``: a pair's loss depends on the other pairs of its batch.
    ``divergence``: only differences of log-ratios matter to it, so that another f-divergence may replace the reverse
    KL. ``unpaired``: it reads LabelledLogps. ``rewards``: what it calls log-probabilities are a reward model's scores.
    ``per_token``: the rewards that it implies are per token. ``running``: by objective,
    ``update(policy, ref, old) -> new`` of what it keeps over the steps; ``old`` is None before the first.
    """

    reference: bool = True
    lengths: bool = False
    reads: frozenset[str] = frozenset()
    batch: bool = False
    divergence: bool = False
    unpaired: bool = False
    rewards: bool = False
    per_token: bool = False
    running: dict[str, Callable] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "Traits") -> "Traits":
        """Of an objective made of two."""
        return Traits(
            reference=self.reference or other.reference,
            lengths=self.lengths or other.lengths,
            reads=self.reads | other.reads,
            batch=self.batch or other.batch,
            divergence=self.divergence and other.divergence,
            unpaired=self.unpaired or other.unpaired,
            rewards=self.rewards or other.rewards,
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
    given = Traits(reads=frozenset(reads), **declared)

    def declare(objective: F) -> F:
        objective.traits = given  # type: ignore[attr-defined]
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
