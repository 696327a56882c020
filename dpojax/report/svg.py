"""Charts as SVG that stands in a page: colours and fonts are the page's, so it is light or dark as that is."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape
from typing import Any, Literal, TypeAlias

COLOURS = 8
"""That series have one after another; the page's style names them ``--s0`` to ``--s7``."""
PLAIN = -1
"""The colour of what is no series among others, the text's."""
LARGEST = 1e100
"""What is as large is not drawn; what is as small, no distance."""
COLUMNS = 400
"""Of a line with more points than twice as many, each column keeps the least and the greatest."""
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",  # circle
    "M-3.5 -3.5H3.5V3.5H-3.5Z",  # square
    "M0 -4.6L4.3 3.4H-4.3Z",  # triangle
    "M0 -5L5 0L0 5L-5 0Z",  # diamond
    "M0 4.6L4.3 -3.4H-4.3Z",  # triangle upside down
    "M-1.6 -4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",  # cross
    "M4.6 0L-3.4 4.3V-4.3Z",  # triangle to the right
    "M-4.6 0L3.4 4.3V-4.3Z",  # triangle to the left
)
"""A shape for each colour, for those who do not tell colours apart."""
Line: TypeAlias = Literal["none", "thin", "faint", "plain", "dashed", "dotted"]
DASHES = {"dashed": "6 4", "dotted": "2 3"}


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of a chart, joined or marked.

    Attributes:
      name: in the legend; empty for none.
      points: ``(x, y)``, in the order in which they are joined.
      colour: its number, from 0.
      line: how the points are joined.
      marked: whether each has a mark.
      hollow: whether marks are outlines.
      errors: half the length of each point's error bars, ``(x, y)``; 0 for none.
      labels: what each mark says when it is pointed at.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    line: Line = "plain"
    marked: bool = False
    hollow: bool = False
    errors: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """Some series over the same axes, with a title, and a sentence on what is seen."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    says: str = ""
    log_x: bool = False
    log_y: bool = False
    large: bool = False

    def legend(self) -> list[Series]:
        """The first series of each name, where more than one name is told apart."""
        named = {series.name: series for series in reversed(self.series) if series.name}
        return list(reversed(named.values())) if len(named) > 1 else []


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: from values to pixels, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (v - low) / (high - low)


def axis(values: Sequence[float], start: float, end: float, log: bool, ticks: int) -> Axis:
    """The axis that holds all values, which are above 0 where it is logarithmic, with about so many ticks."""
    low, high = min(values), max(values)
    if log:
        if high / low < 1.01:
            low, high = low / 2, high * 2
        return Axis(low / 1.1, high * 1.1, start, end, True, log_ticks(low / 1.1, high * 1.1, ticks))
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / LARGEST):
        room = max(abs(low) / 10, 1 / LARGEST) if low else 1.0
    else:
        room = 0.04 * (high - low)
    low, high = (0.0 if low == 0 else low - room), high + room
    return Axis(low, high, start, end, False, nice_ticks(low, high, ticks))


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten, about so many.

    >>> nice_ticks(0.0, 1.04, 5)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.10g}") for i in range(first, last + 1))


def log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Powers of ten from low to high, not more than so many; with 2 and 5 times them where few are in the range.

    >>> log_ticks(0.9, 30.0, 5)
    (1.0, 2.0, 5.0, 10.0, 20.0)
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first + 1) / count))
    digits = (1, 2, 5) if high < 100 * low else (1,)
    values = (m * 10.0**power for power in range(first, last + 1, every) for m in digits)
    return tuple(float(f"{v:.10g}") for v in values if low <= v <= high)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or, of very many, those that are seen: the least and the greatest of each column."""
    if len(points) <= 2 * COLUMNS:
        return list(points)
    kept = []
    for column in range(COLUMNS):
        some = points[column * len(points) // COLUMNS : (column + 1) * len(points) // COLUMNS]
        ends = {min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def drawable(chart: Chart) -> Chart:
    """The chart without what has no place on its axes: what is not finite or beyond all measure, and on a logarithmic
    axis 0 and below."""

    def fits(point: tuple[float, float]) -> bool:
        logs = (chart.log_x, chart.log_y)
        return all((1 / LARGEST if log else -LARGEST) < v < LARGEST for v, log in zip(point, logs, strict=True))

    def cut(series: Series) -> Series:
        kept = [i for i, point in enumerate(series.points) if fits(point)]
        aligned = {name: getattr(series, name) for name in ("points", "errors", "labels")}
        some: dict[str, Any] = {name: [values[i] for i in kept] for name, values in aligned.items() if values}
        return dataclasses.replace(series, **some)

    return dataclasses.replace(chart, series=[s for s in map(cut, chart.series) if s.points])


def draw(chart: Chart) -> str:
    """The chart as an ``<svg>`` element; empty where it has no point."""
    chart = drawable(chart)
    if not chart.series:
        return ""
    width, height = (720, 430) if chart.large else (400, 250)
    reach = [_reach(series, chart) for series in chart.series]
    xs, ys = [x for pairs, _ in reach for x in pairs], [y for _, pairs in reach for y in pairs]
    y_axis = axis(ys, height - (52 if chart.large else 38), 30, chart.log_y, 6 if chart.large else 5)
    letters = max(len(tick_label(tick)) for tick in y_axis.ticks) if y_axis.ticks else 1
    left = (22 + 13 * letters) if chart.large else (16 + 7 * letters)
    x_axis = axis(xs, left, width - 16, chart.log_x, 6 if chart.large else 5)
    said = escape(f"{chart.title}: {chart.y_label} by {chart.x_label}. {chart.says}".strip(), quote=True)
    kind = "chart large" if chart.large else "chart"
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{said}">']
    parts += _frame(chart, x_axis, y_axis, width, height)
    parts += [line for series in chart.series for line in _marks(series, x_axis, y_axis)]
    return "\n".join([*parts, "</svg>"])


def _reach(series: Series, chart: Chart) -> tuple[list[float], list[float]]:
    """All x and all y of a series, the ends of its error bars among them."""
    errors = series.errors or [(0.0, 0.0)] * len(series.points)
    reach = []
    for i, log in ((0, chart.log_x), (1, chart.log_y)):
        pairs = [(p[i] - e[i], p[i] + e[i]) for p, e in zip(series.points, errors, strict=True)]
        reach.append([v for pair in pairs for v in pair if v > 0 or not log])
    return reach[0], reach[1]


def _frame(chart: Chart, x_axis: Axis, y_axis: Axis, width: int, height: int) -> list[str]:
    """Grid, ticks and the names of the axes."""
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    parts = ['<g class="grid">']
    for tick in y_axis.ticks:
        parts.append(f'<path d="M{left:.1f} {y_axis.at(tick):.1f}H{right:.1f}"/>')
    for tick in x_axis.ticks:
        parts.append(f'<path d="M{x_axis.at(tick):.1f} {bottom:.1f}V{top:.1f}"/>')
    parts += ["</g>", f'<path class="axes" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>', '<g class="ticks">']
    for tick in y_axis.ticks:
        parts.append(f'<text x="{left - 6:.1f}" y="{y_axis.at(tick):.1f}" class="y">{tick_label(tick)}</text>')
    below = 22 if chart.large else 16
    for tick in x_axis.ticks:
        parts.append(f'<text x="{x_axis.at(tick):.1f}" y="{bottom + below:.1f}" class="x">{tick_label(tick)}</text>')
    names = (f"{chart.y_label}{' (log)' if chart.log_y else ''}", f"{chart.x_label}{' (log)' if chart.log_x else ''}")
    parts.append(f'<text x="4" y="16">{escape(names[0])}</text>')
    parts.append(f'<text x="{width - 16}" y="{height - 6}" class="end">{escape(names[1])}</text>')
    return [*parts, "</g>"]


def _marks(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    """A series: its line, its error bars, its marks."""
    parts = [f'<g class="{_class(series)}">']
    if series.line != "none" and len(series.points) > 1:
        joined = "L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in thinned(series.points))
        dash = f' stroke-dasharray="{DASHES[series.line]}"' if series.line in DASHES else ""
        parts.append(f'<path class="line {series.line}"{dash} d="M{joined}"/>')
    for (x, y), (dx, dy) in zip(series.points, series.errors, strict=False):
        x0, x1, y0, y1 = (
            a.at(max(v, a.low)) for a, v in ((x_axis, x - dx), (x_axis, x + dx), (y_axis, y - dy), (y_axis, y + dy))
        )
        bars = (f"M{x0:.1f} {y_axis.at(y):.1f}H{x1:.1f}" if dx else "") + (
            f"M{x_axis.at(x):.1f} {y0:.1f}V{y1:.1f}" if dy else ""
        )
        parts += [f'<path class="line error" d="{bars}"/>'] if bars else []
    if series.marked or len(series.points) == 1:
        for i, (x, y) in enumerate(series.points):
            label = f"<title>{escape(series.labels[i])}</title>" if series.labels else ""
            place = f"translate({x_axis.at(x):.1f} {y_axis.at(y):.1f})"
            parts.append(f'<g transform="{place}"><path class="mark" d="{mark(series.colour)}">{label}</path></g>')
    return [*parts, "</g>"]


def _class(series: Series) -> str:
    colour = "sx" if series.colour == PLAIN else f"s{series.colour % COLOURS}"
    return colour + " hollow" * series.hollow


def mark(colour: int) -> str:
    """The path of the mark that series of a colour have, around 0, 0."""
    return MARKS[colour % len(MARKS)]


def swatch(series: Series) -> str:
    """What the legend shows of a series."""
    dash = f' stroke-dasharray="{DASHES[series.line]}"' if series.line in DASHES else ""
    line = "" if series.line == "none" else f'<path class="line plain"{dash} d="M1 8H23"/>'
    dot = f'<path class="mark" transform="translate(12 8)" d="{mark(series.colour)}"/>' if series.marked else ""
    return f'<svg class="swatch {_class(series)}" viewBox="0 0 24 16" aria-hidden="true">{line}{dot}</svg>'


def tick_label(value: float) -> str:
    """A tick's number, short.

    >>> tick_label(0.25), tick_label(1e-05), tick_label(20000.0)
    ('0.25', '1e-5', '20000')
    """
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
