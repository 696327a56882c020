"""Which of two completions a judge prefers, and the win rate that verdicts amount to."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from dpojax.data.dialogue import Text, hash_of_text
from dpojax.evaluate.statistics import Estimate, estimate

Verdict = Literal["A", "B", "tie", "unparsed"]
VERDICTS: tuple[Verdict, ...] = ("A", "B", "tie", "unparsed")
VALUES = {"A": 1.0, "tie": 0.5, "B": 0.0}
"""What a verdict counts for A."""
Z = statistics.NormalDist().inv_cdf(0.975)


class Judge(Protocol):
    """Prompts, A's completions and B's, three lists of one length -> of every prompt, the verdict."""

    def __call__(self, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text], /) -> Sequence[Verdict]: ...


def verdict_of_scores(a: float, b: float) -> Verdict:
    """Whose score is higher; equal ones are a tie."""
    return "A" if a > b else "B" if b > a else "tie"


def reward_judge(rewards: Callable[[Sequence[Text], Sequence[Text]], Sequence[float]]) -> Judge:
    """A judge that prefers the completion of the higher reward.

    Args:
      rewards: a function of prompts and completions that gives a number for each, as for ``dpojax score --scorer``.
    """

    def judge(prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text], /) -> list[Verdict]:
        of_a, of_b = (np.asarray(rewards(prompts, side), np.float64) for side in (a, b))
        if not len(of_a) == len(of_b) == len(prompts) or not np.isfinite([*of_a, *of_b]).all():
            raise ValueError(f"a reward function must give a finite number for each of {len(prompts)} completions")
        return [verdict_of_scores(x, y) for x, y in zip(of_a, of_b, strict=True)]

    return judge


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of several answers about one comparison: what all say, and a tie where they differ."""
    if "unparsed" in verdicts:
        return "unparsed"
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often A wins over B.

    Attributes:
      rate: the win rate, a tie counting half, every prompt weighing the same; its standard error is over prompts.
      low, high: the 95 % confidence interval.
      interval: how the interval was made.
      wins, losses, ties: counts of verdicts.
      unparsed: the places in the list of those that say nothing; they are not in the rate.
      bounds: the win rate if A had lost all of the unparsed, and if it had won them.
      p_value: of the sign test over prompts, those with as many wins as losses left out.
    """

    rate: Estimate
    low: float
    high: float
    interval: str
    wins: int
    losses: int
    ties: int
    unparsed: tuple[int, ...]
    bounds: tuple[float, float]
    p_value: float

    def __str__(self) -> str:
        return f"{self.rate} (95 %: {self.low:.3f} to {self.high:.3f})"


def win_rate_of(verdicts: Sequence[Verdict], prompts: Sequence[Text] | None = None) -> WinRate:
    r"""The win rate that verdicts amount to, with its 95 % confidence interval.

    Where every prompt has one comparison, the interval is Wilson's (:func:`wilson`), of n comparisons. Where prompts
    have several, it is Wilson's at the number of independent comparisons that would have the standard error over
    prompts, :math:`\hat p (1 - \hat p) / s^2`, which lies between the number of prompts and of comparisons.

    Args:
      verdicts: at least one.
      prompts: of every verdict, its prompt (default: each another).
    """
    groups: list[object] = list(range(len(verdicts))) if prompts is None else [hash_of_text(p) for p in prompts]
    known = [(VALUES[v], g) for v, g in zip(verdicts, groups, strict=True) if v != "unparsed"]
    unparsed = tuple([i for i, v in enumerate(verdicts) if v == "unparsed"])
    counts = {v: verdicts.count(v) for v in VERDICTS}
    low_bound, high_bound = (
        estimate([VALUES.get(v, other) for v in verdicts], groups).mean for other in (VALUES["B"], VALUES["A"])
    )
    nan = math.nan
    if not known:
        rate, interval, low, high, p_value = Estimate(nan, nan, 0), "none: no verdict", nan, nan, nan
    else:
        values, of = zip(*known, strict=True)
        rate = estimate(values, of)
        n, p = float(rate.n), rate.mean
        interval = "Wilson"
        if len(values) > rate.n:
            interval = "Wilson, clustered over prompts"
            n = float(np.clip(p * (1 - p) / rate.error**2, n, len(values))) if rate.error > 0 else n
        low, high = wilson(p, n)
        p_value = sign_test(values, of)
    return WinRate(
        *(rate, low, high, interval, counts["A"], counts["B"], counts["tie"], unparsed),
        bounds=(low_bound, high_bound),
        p_value=p_value,
    )


def judge_completions(judge: Judge, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]) -> WinRate:
    """The win rate of completions ``a`` over completions ``b`` of the same prompts, by a judge.

    >>> by_length = reward_judge(lambda prompts, completions: list(map(len, completions)))
    >>> print(judge_completions(by_length, ["x", "y", "z"], ["aaa", "aa", "a"], ["a", "aa", "aa"]).rate)
    0.500 ± 0.289
    """
    if not len(prompts) == len(a) == len(b):
        raise ValueError(f"{len(prompts)} prompts, {len(a)} and {len(b)} completions; give one of each a comparison")
    return win_rate_of(judge(prompts, a, b), prompts)


def wilson(p: float, n: float) -> tuple[float, float]:
    r"""Wilson's 95 % confidence interval of a share p that was seen in n trials.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4 n^2}}{1 + z^2 / n}

    With ties as halves it is too wide, never too narrow: they vary less. Source: Wilson 1927.

    >>> tuple(round(x, 4) for x in wilson(0.8, 10))
    (0.4902, 0.9433)
    """
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(max(0.0, p * (1 - p)) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def sign_test(values: Sequence[float], groups: Sequence[object]) -> float:
    """The two-sided p-value of as uneven a count of groups that A wins and that B wins, if either were as likely.

    >>> round(sign_test([1, 1, 1, 1, 0.5, 0], range(6)), 4)  # 4 of 5: 2 (1 + 5) / 32
    0.375
    """
    members: dict[object, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value - 0.5)
    sums = [sum(m) for m in members.values()]
    wins, losses = sum(s > 0 for s in sums), sum(s < 0 for s in sums)
    n, ways, total = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        total += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)
