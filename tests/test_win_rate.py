"""Win rates, intervals and agreement of verdicts, against statsmodels' figures and by hand."""

import numpy as np
import pytest

from dpojax.evaluate.judges import agreement, win_rate_of
from dpojax.evaluate.judges.verdicts import wilson


def test_intervals():
    """Wilson's of statsmodels 0.15 (proportion_confint); clustered, at most as narrow as of independent comparisons."""
    wins = win_rate_of(["A"] * 130 + ["B"] * 90)
    assert (wins.low, wins.high) == pytest.approx((0.5249208352479956, 0.6537770708983434))
    assert wins.interval == "Wilson" and wins.rate.error == pytest.approx(np.sqrt(13 / 22 * 9 / 22 / 219))
    prompts = [str(i // 4) for i in range(40)]
    alike = win_rate_of([v for v in "AABABBAAAB" for _ in range(4)], prompts)  # four copies say no more than one
    assert alike.rate.n == 10 and (alike.low, alike.high) == pytest.approx(wilson(0.6, 10))
    partly = win_rate_of([*("AAAA" * 2 + "AAAB" * 3 + "AABB" * 4 + "ABBB")], prompts)
    p, error = 26 / 40, np.std([1, 1, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5, 0.25], ddof=1) / np.sqrt(10)
    assert 10 < p * (1 - p) / error**2 < 40 and partly.rate.error == pytest.approx(error)
    assert (partly.low, partly.high) == pytest.approx(wilson(p, p * (1 - p) / error**2))
    mixed = win_rate_of([*"AABB"] * 10, prompts)  # every prompt says the same
    assert mixed.rate.error == 0 and (mixed.low, mixed.high) == pytest.approx(wilson(0.5, 10))
    none = win_rate_of(["unparsed"])
    assert np.isnan([none.rate.mean, none.low, none.p_value]).all() and none.bounds == (0, 1)


def test_cohens_kappa():
    """Kappa and its standard error as statsmodels 0.15 has them (cohens_kappa)."""
    table = {"AA": 40, "AB": 9, "At": 3, "BA": 6, "BB": 25, "Bt": 4, "tA": 5, "tB": 2, "tt": 6, "Au": 2, "uu": 1}
    names = {"A": "A", "B": "B", "t": "tie", "u": "unparsed"}
    one, other = ([names[both[i]] for both, n in table.items() for _ in range(n)] for i in (0, 1))
    found = agreement(one, other)
    assert (found.n, found.unparsed, found.share) == (100, 3, pytest.approx(0.71))
    assert (found.kappa, found.error) == pytest.approx((0.5100523737117756, 0.0741365230155348))
    assert np.isnan(agreement(["A", "A"], ["A", "A"]).kappa)
