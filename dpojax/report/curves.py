"""Which charts a report has: of runs their curves by step, of experiments reward against KL and what else they have."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax.report.numbers import shown, with_error
from dpojax.report.read import Point, Run
from dpojax.report.svg import PLAIN, Chart, Line, Series

SMOOTHED = 75
"""Steps from which on a running mean is drawn over a curve; its window is a 25th of them."""
DECADES = 100
"""The ratio of greatest to least from which on an axis of values above 0 is logarithmic."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Metrics of one chart: its title, their names, the vertical axis, and a sentence."""

    title: str
    names: tuple[str, ...]
    unit: str
    says: str = ""
    may_be_log: bool = False
    noisy: bool = True


CURVES = (
    Curve("Loss", ("loss",), "loss", may_be_log=True),
    Curve("Reward accuracy", ("rewards/accuracies",), "share of pairs", "The chosen side has more; a tie is half."),
    Curve("Reward margin", ("rewards/margins",), "nats", "Reward of the chosen side less the rejected one's."),
    Curve("Rewards", ("rewards/chosen", "rewards/rejected"), "nats", "Beta times the log-ratio."),
    Curve("Log-probabilities", ("logps/chosen", "logps/rejected"), "nats", "Of whole completions, under the policy."),
    Curve("Gradient norm", ("grad_norm",), "norm", "Before clipping.", may_be_log=True),
    Curve("Learning rate", ("learning_rate",), "rate", noisy=False),
    Curve("Speed", ("tokens_per_second",), "tokens/s"),
)
UNDRAWN = ("step", "epoch", "padding_share", "pairs_per_second", "loss_stands_still")
LINES: tuple[Line, ...] = ("plain", "dashed", "dotted")


def run_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each group of metrics that some run has; held-out ones are marks in the same chart."""
    known = {name for curve in CURVES for name in curve.names}
    found = {name.removeprefix("eval_") for run in runs for line in run.metrics for name in line}
    others = [Curve(name, (name,), "") for name in sorted(found - known - set(UNDRAWN))]
    return [chart for curve in (*CURVES, *others) if (chart := _run_chart(curve, runs)).series]


def _run_chart(curve: Curve, runs: Sequence[Run]) -> Chart:
    series: list[Series] = []
    several, sides = len(runs) > 1, len(curve.names) > 1
    for colour, run in enumerate(runs):
        for side, name in enumerate(curve.names):
            side_name = name.rpartition("/")[2] if sides else ""
            label = ", ".join(filter(None, (run.name if several else "", side_name)))
            colour_of = colour if several else side
            line: Line = LINES[side] if several else "plain"
            points, held_out = run.series(name), run.series(f"eval_{name}")
            if curve.noisy and len(points) >= SMOOTHED:
                series.append(Series("", points, colour_of, "faint"))
                points = running_mean(points)
            if points:
                series.append(Series(label, points, colour_of, line))
            if held_out:
                name_of = ", ".join(filter(None, (label, "held out")))
                series.append(Series(name_of, held_out, colour_of, "dotted", marked=True, hollow=several and side > 0))
    if not several and not sides:  # what is held out is told by its marks
        series = [dataclasses.replace(s, name="") for s in series]
    log = curve.may_be_log and _spans_decades([y for s in series for _, y in s.points])
    return Chart(curve.title, "step", curve.unit, series, curve.says, log_y=log)


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a window around each point, a 25th of all, which is shorter at the ends.

    >>> running_mean([(float(i), float(i)) for i in range(100)])[:3]
    [(0.0, 1.0), (1.0, 1.5), (2.0, 2.0)]
    """
    half = max(1, len(points) // 50)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends, strict=True)]


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= DECADES


def is_curve(raw: Any) -> bool:
    """Whether results are a curve of reward against KL: lists of numbers of these names, of the same length."""
    kls, rewards = (raw.get("kl"), raw.get("reward")) if isinstance(raw, dict) else (None, None)
    if not isinstance(kls, list) or not isinstance(rewards, list) or len(kls) != len(rewards):
        return False
    return bool(kls) and all(isinstance(x, int | float) for x in (*kls, *rewards))


def curves_in(results: Any) -> dict[str, list[tuple[float, float]]]:
    """The curves of reward against KL in an experiment's results, by name, such as the optimum or Best-of-N."""
    raw = results if isinstance(results, dict) else {}
    return {name: sorted(zip(x["kl"], x["reward"], strict=True)) for name, x in raw.items() if is_curve(x)}


def experiment_charts(points: Sequence[Point], curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[Chart]:
    """Reward against KL, where the points have them, beside such curves; then every figure by step."""
    methods = list(dict.fromkeys(point.method for point in points))
    names = list(dict.fromkeys(name for point in points for line in point.curve for name in line if name != "step"))
    charts = [_frontier(points, methods, curves)] if {"reward", "kl"} <= set(names) else []
    for name in names:
        pairs = [_by_step(point, name, methods.index(point.method)) for point in points if point.series(name)[1:]]
        series = [one for pair in pairs for one in pair]
        if series:
            log = name != "reward" and _spans_decades([y for s in series for _, y in s.points])
            charts.append(Chart(name, "step", "nats" if name == "kl" else name, series, log_y=log))
    return charts


def _by_step(point: Point, name: str, colour: int) -> tuple[Series, Series]:
    """A figure of a point by step, and a mark at its end."""
    values = [(step, value.mean) for step, value in point.series(name)]
    step, last = point.series(name)[-1]
    label = f"{point_name(point)}: {name} {with_error(last)} at step {step:g}"
    end = Series(point.method or "points", values[-1:], colour, "none", marked=True, labels=[label])
    return Series("", values, colour, "thin"), end


def _frontier(
    points: Sequence[Point], methods: Sequence[str], curves: Mapping[str, Sequence[tuple[float, float]]]
) -> Chart:
    """Reward against KL: each point's last estimate with its errors, and thin its way there.

    The curves are drawn as far as the points reach.
    """
    series: list[Series] = []
    ends: list[float] = []
    for method in methods:
        colour, last, errors, labels = methods.index(method), [], [], []
        for point in (p for p in points if p.method == method):
            both = [(line["kl"], line["reward"]) for line in point.curve if {"kl", "reward"} <= line.keys()]
            if not both:
                continue
            series.append(Series("", [(k.mean, r.mean) for k, r in both], colour, "faint"))
            kl, reward = both[-1]
            last.append((kl.mean, reward.mean))
            errors.append((kl.error or 0.0, reward.error or 0.0))
            labels.append(f"{point_name(point)}: reward {with_error(reward)} at KL {with_error(kl)}")
        ends += [x for x, _ in last]
        series.append(Series(method or "points", last, colour, "none", marked=True, errors=errors, labels=labels))
    reach = 1.1 * max(ends, default=0)
    for name, curve in curves.items():
        line = LINES[list(curves).index(name) % len(LINES)]
        series.insert(0, Series(name, [(x, y) for x, y in curve if x <= reach], PLAIN, line))
    # One policy that has gone far astray would press all others to the left edge.
    far = min(ends, default=0) > 0 and max(ends) > 30 * statistics.median(ends)
    says = "Each point's last estimate with its standard errors; the thin line is its way there."
    return Chart("Reward against KL", "KL from the reference, nats", "reward", series, says, log_x=far, large=True)


def point_name(point: Point) -> str:
    """A point's name, with its seed if that is not in it."""
    seed = point.facts.get("seed")
    return point.name if seed is None or str(seed) in point.name else f"{point.name}, seed {shown(seed)}"
