"""How far two judges agree, beyond what chance would give."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dpojax.evaluate.judges.verdicts import Verdict

CATEGORIES: tuple[Verdict, ...] = ("A", "B", "tie")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The agreement of two judges about the same comparisons.

    Attributes:
      n: comparisons about which both have a verdict.
      unparsed: comparisons about which one of them has none; they are left out.
      share: of comparisons with the same verdict.
      kappa: Cohen's; NaN where both judges always say the same one thing.
      error: kappa's standard error.
    """

    n: int
    unparsed: int
    share: float
    kappa: float
    error: float

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.n} alike, Cohen's kappa {self.kappa:.3f} ± {self.error:.3f}"


def agreement(verdicts: Sequence[Verdict], others: Sequence[Verdict]) -> Agreement:
    r"""Share of equal verdicts, and Cohen's kappa with its large-sample standard error.

    .. math:: \kappa = \frac{p_o - p_e}{1 - p_e}, \quad p_o = \sum_i p_{ii}, \quad p_e = \sum_i p_{i\cdot} p_{\cdot i}

    over the verdicts A, B and tie. Sources: Cohen 1960; the standard error is that of Fleiss, Cohen and Everitt 1969.

    >>> print(agreement([*"AAABB"], [*"AABBB"]))
    0.800 of 5 alike, Cohen's kappa 0.615 ± 0.318
    """
    both = [(x, y) for x, y in zip(verdicts, others, strict=True) if "unparsed" not in (x, y)]
    n, left_out = len(both), len(verdicts) - len(both)
    if not n:
        return Agreement(0, left_out, math.nan, math.nan, math.nan)
    p = np.zeros((len(CATEGORIES), len(CATEGORIES)))
    for x, y in both:
        p[CATEGORIES.index(x), CATEGORIES.index(y)] += 1 / n
    rows, columns, same = p.sum(axis=1), p.sum(axis=0), np.diag(p)
    observed, chance = float(same.sum()), float(rows @ columns)
    if math.isclose(chance, 1.0):
        return Agreement(n, left_out, observed, math.nan, math.nan)
    kappa = (observed - chance) / (1 - chance)
    on = float(same @ (1 - (rows + columns) * (1 - kappa)) ** 2)
    squares = p * (columns[:, None] + rows[None, :]) ** 2
    off = (1 - kappa) ** 2 * float(squares.sum() - np.diag(squares).sum())
    variance = (on + off - (kappa - chance * (1 - kappa)) ** 2) / (n * (1 - chance) ** 2)
    return Agreement(n, left_out, observed, kappa, math.sqrt(max(0.0, variance)))
