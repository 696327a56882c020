"""An objective and its slope along the log-ratio margin of one pair, and a picture of several."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.errors import UserError, first_line
from dpojax.losses import Objective, spelled, traits_of
from dpojax.types import STATISTICS, LabelledLogps, PairLogps, Sides

POINTS = 401  # odd, so that 0 is one of them
SPAN_OF_BETA = 4.0  # sigmoid is then all but 0 at the right end, and hinge has its kink at a quarter of the way
LARGEST_SPAN = 1e4  # nats; up to there every objective of ours is finite
STEEP = 2.0  # ranges of the median curve; a steeper one is cut off, so that the others can be seen


@dataclasses.dataclass(frozen=True)
class Curve:
    """A loss and its derivative over log-ratio margins (nats)."""

    name: str
    margins: np.ndarray
    losses: np.ndarray
    slopes: np.ndarray
    single: bool = False  # over the log-ratio of one completion, which is no pair's


def pair_at(margin: jax.Array, base: float, rewards: bool = False) -> tuple[PairLogps, PairLogps]:
    """Policy and reference of one pair whose chosen log-ratio is half the margin and whose rejected one is minus that.

    All else is neutral: completions of one token, ``base`` nats each under the reference; token distributions as a
    completion sampled from the policy has them on average (a WPO weight of 1); every other statistic 0, such as the
    divergence from the reference; a margin and a weight of 1 in the data. A reward model's scores have no margin in the
    data, which is optional there.
    """
    ones = jnp.ones((1,))
    sums: dict[str, Any] = {"chosen": base + margin[None] / 2, "rejected": base - margin[None] / 2}
    fields: dict[str, Any] = {name: Sides(*(0.0 * x for x in sums.values())) for name in STATISTICS}
    fields |= {"tokens": Sides(*(x[:, None] for x in sums.values())), "squares": Sides(*sums.values())}
    fields |= {f"{side}_len": jnp.ones((1,), jnp.int32) for side in sums}
    fields |= {"margin": None if rewards else ones, "weight": ones, "mean_chosen_len": jnp.float32(1)}
    policy = PairLogps(**sums, **fields, key=jax.random.split(jax.random.key(0), 1))
    at: dict[str, Any] = {"chosen": base * ones, "rejected": base * ones}
    at["tokens"] = Sides(*(x[:, None] for x in at.values()))
    return policy, dataclasses.replace(policy, **at)


def completion_at(log_ratio: jax.Array, base: float, label: float) -> tuple[LabelledLogps, LabelledLogps]:
    """Policy and reference of one labelled completion of one token; the two agree on another prompt's completion."""
    ones = jnp.ones((1,))
    ref = LabelledLogps(base * ones, jnp.ones((1,), jnp.int32), label * ones, base * ones)
    return dataclasses.replace(ref, logps=base + log_ratio[None]), ref


def curves_of(name: str, objective: Objective, span: float) -> list[Curve]:
    """The objective's curve from -span to span nats, or, where it is of labelled completions, a curve for each label.

    The batch is that one pair, and running means are those of a run whose policy still is its reference. Where an
    objective lets no gradient through, neither does the slope: it is what a training step follows.

    Args:
      name: of the objective, for the legend.
      objective: ``(policy, ref) -> [B]``.
      span: largest margin, nats.

    Raises:
      UserError: the objective, which may be the user's, cannot be computed or differentiated.
    """
    traits = traits_of(objective)
    base = 0.0 if traits.on == "scores" else base_of(span)
    points: dict[str, Callable] = {
        name: lambda h: pair_at(h, base, traits.on == "scores" and "margin" not in traits.reads)
    }
    if traits.on == "labels":
        points = {
            f"{name}, desirable": lambda u: completion_at(u, base, 1.0),
            f"{name}, undesirable": lambda u: completion_at(u, base, 0.0),
        }
    right = np.linspace(0, span, POINTS // 2 + 1, dtype=np.float32)
    margins = np.concatenate([-right[:0:-1], right])  # 0 exactly in the middle
    curves = []
    try:
        for label, at in points.items():
            losses, slopes = _along(objective, at)(margins)
            curves.append(Curve(label, margins, np.asarray(losses), np.asarray(slopes), traits.on == "labels"))
    except Exception as error:  # of anybody's code
        raise UserError(f"{name}: cannot be differentiated ({first_line(error)})") from None
    return curves


def curves_named(names: Sequence[str], beta: float | None = None, span: float | None = None) -> list[Curve]:
    """The curves of the objectives that are spelled so.

    Args:
      names: spellings (:func:`~dpojax.losses.spelled`); one that is there twice is drawn once.
      beta: for every objective that has it and does not bind it itself.
      span: largest margin, nats; by default four over the smallest beta.

    Raises:
      UserError: a spelling of none, a beta that none takes, a span that is none.
    """
    read = {}
    for name in names:
        try:
            read[name] = spelled(name, beta=beta)
        except ValueError as error:
            raise UserError(str(error)) from None
    if beta is not None and all(found.unused for found in read.values()):
        raise UserError(f"--beta {beta}: none of {', '.join(read)} takes it from there; leave it out")
    if span is None:
        span = SPAN_OF_BETA / min((found.beta for found in read.values() if found.beta > 0), default=1.0)
    if not 0 < span <= LARGEST_SPAN:
        raise UserError(f"--span {span}: must be above 0 and at most {LARGEST_SPAN:g}")
    return [curve for name, found in read.items() for curve in curves_of(name, found.objective, span)]


def table(curves: Sequence[Curve]) -> list[str]:
    """A line a curve: its value and slope in the middle, where policy and reference agree."""
    width, middle = max(len(curve.name) for curve in curves), POINTS // 2
    base = base_of(float(curves[0].margins[-1]))
    return [
        f"where policy and reference agree, completions of 1 token, {base:.4g} nats each (a reward model's scores: 0):",
        *(
            f"{curve.name:{width}}  loss {curve.losses[middle]:10.4f}  slope {curve.slopes[middle]:10.4f} per nat"
            for curve in curves
        ),
    ]


def base_of(span: float) -> float:
    """The log-probability, nats, of both completions under the reference: that of none exceeds -1 anywhere."""
    return -(1 + span / 2)


def _along(objective: Objective, at: Callable) -> Callable:
    def loss(margin: jax.Array) -> jax.Array:
        policy, ref = at(margin)
        start = at(jnp.zeros_like(margin))
        running = {key: update(*start, None) for key, update in traits_of(objective).running.items()}
        return objective(dataclasses.replace(policy, running=running or None), ref)[0]

    return jax.jit(jax.vmap(jax.value_and_grad(loss)))


def check_matplotlib() -> None:
    """Refuse to draw without it, before anything is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("curves are drawn by matplotlib, which is not installed; run pip install matplotlib")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Two panels, losses and slopes, in a PNG file that is either complete or not there.

    Raises:
      UserError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(curves) // 4)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4 + 0.22 * rows), layout="constrained")
    styles = ("-", "--", ":", "-.")
    pale = {"color": "grey", "linewidth": 0.6}
    for axis, values in zip(axes, ([c.losses for c in curves], [c.slopes for c in curves]), strict=True):
        for i, (curve, y) in enumerate(zip(curves, values, strict=True)):
            style = {"color": f"C{i % 10}", "linestyle": styles[i // 10 % 4]}
            axis.plot(curve.margins, y, label=curve.name, linewidth=1.8, **style)
        axis.set(xlabel=_margin_label(curves), xlim=(curves[0].margins[0], curves[0].margins[-1]), ylim=limits(values))
        axis.axhline(0, **pale)
        axis.axvline(0, **pale)
    axes[0].set(title="loss", ylabel="loss of a pair or completion")
    axes[1].set(title="slope: what a training step follows", ylabel="derivative of the loss, per nat")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(curves)))
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=100)
    plt.close(figure)
    partial.replace(path)


def _margin_label(curves: Sequence[Curve]) -> str:
    kinds = {curve.single for curve in curves}
    names = {False: "log-ratio margin h of a pair", True: "log-ratio u of a completion"}
    return " or ".join(text for single, text in names.items() if single in kinds) + ", nats"


def limits(values: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """The panel's lower and upper end, which cut steep curves off; None where nothing is finite."""
    finite = [y[np.isfinite(y)] for y in values if np.isfinite(y).any()]
    if not finite:
        return None
    ranges = sorted(float(np.ptp(y)) for y in finite)
    room = ranges[(len(ranges) - 1) // 2] or 1.0
    calm = [y for y in finite if np.ptp(y) <= STEEP * room]
    low = max(min(float(y.min()) for y in finite), min(float(y.min()) for y in calm) - room / 2)
    high = min(max(float(y.max()) for y in finite), max(float(y.max()) for y in calm) + room / 2)
    rim = 0.04 * (high - low or 1)
    return low - rim, high + rim
