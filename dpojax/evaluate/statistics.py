"""A mean with its standard error."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, in the values' unit; ``n`` independent groups stand behind it."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def estimate(values: Sequence[float] | np.ndarray, groups: Sequence[object] | None = None) -> Estimate:
    r"""Mean of the values and :math:`s / \sqrt n`, its standard error.

    Args:
      values: one number a row.
      groups: rows of one group (say, of one prompt) are not independent; their means are what the error is taken
        over, with every group weighing the same. Default: every row a group.

    >>> print(estimate([0.0, 1.0, 0.0, 1.0]))
    0.500 ± 0.289
    >>> print(estimate([0.0, 1.0, 0.0, 1.0], groups=["a", "a", "b", "b"]))
    0.500 ± 0.000
    """
    rows = np.asarray(values, np.float64)
    if groups is not None:
        members: dict[object, list[float]] = {}
        for group, value in zip(groups, rows, strict=True):
            members.setdefault(group, []).append(value)
        rows = np.array([np.mean(m) for m in members.values()])
    error = float(rows.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else float("nan")
    return Estimate(float(rows.mean()), error, len(rows))
