"""What experiments make of their points: reward at matched KL, frontiers, tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpojax.evaluate import best_of_n_kl, best_of_n_reward, estimate, reward_at, tilted

Result = dict[str, Any]
"""A point's file."""
KLS = (0.1, 0.25, 0.5, 1.0, 2.0)
"""Nats at which methods are compared."""
TRUSTED = 20.0
"""Effective samples of the median prompt below which the optimum is drawn dashed."""


class Curve(NamedTuple):
    """Rewards by KL, with the numbers that they are of."""

    kl: np.ndarray
    reward: np.ndarray
    of: np.ndarray


class Frontier(NamedTuple):
    """The optimum by beta, from the reference's samples; how many effective samples its median prompt has; and
    Best-of-N by N, at its KL's upper bound."""

    optimum: Curve
    effective: np.ndarray
    best_of_n: Curve


def frontier_of(rewards: np.ndarray, scale: float) -> Frontier:
    """The frontier of mean rewards over prompts, from the rewards of many samples of each, ``[X, M]``."""
    betas = np.geomspace(0.02, 40, 80)
    each = [tilted(scale * rewards, beta) for beta in betas]
    kl, reward = (np.array([getattr(one, name).mean() for one in each]) for name in ("kl", "reward"))
    optimum = Curve(np.append(kl, 0.0), np.append(reward / scale, rewards.mean()), np.append(betas, np.inf))
    effective = np.array([*(np.median(one.effective) for one in each), rewards.shape[1]])
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= rewards.shape[1] // 2]
    best = [float(best_of_n_reward(rewards, n).mean()) for n in ns]
    return Frontier(optimum, effective, Curve(np.array([best_of_n_kl(n) for n in ns]), np.array(best), np.array(ns)))


def last(result: Result, name: str) -> float:
    """A figure of a point's last evaluation."""
    return float(result["curve"][-1][name]["mean"])


def matched(results: Sequence[Result], frontier: Frontier, kls: Sequence[float] = KLS) -> dict[str, dict[str, list]]:
    """By method, its reward at each KL: means over seeds and their standard errors, and every seed's own.

    A frontier is curved, so what is joined by straight lines, in the square root of the KL, is how far a seed's points
    are below the optimum (the reference, at KL 0, is not); the optimum's reward less that is the method's. Where a
    seed's points do not reach a KL, the method has no figure there.
    """
    optimum = lambda kl: reward_at(kl, frontier.optimum.kl, frontier.optimum.reward)  # noqa: E731
    out: dict[str, dict[str, list]] = {}
    for method in dict.fromkeys(r["method"] for r in results):
        seeds: dict[int, list[Result]] = {}
        for result in results:
            if result["method"] == method:
                seeds.setdefault(result["seed"], []).append(result)
        rows = []
        for own in seeds.values():
            kl, reward = (np.array([last(r, name) for r in own]) for name in ("kl", "reward"))
            below, known = optimum(kl) - reward, np.isfinite(optimum(kl))
            at = np.sqrt(np.maximum(np.append(kl[known], 0.0), 0.0))
            rows.append(optimum(np.array(kls)) - reward_at(np.sqrt(kls), at, np.append(below[known], 0.0)))
        mean, error = zip(*(over_seeds(column) for column in np.array(rows).T), strict=True)
        out[method] = {"mean": list(mean), "error": list(error), "seeds": [numbers(row) for row in rows]}
    return out


def numbers(x: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them: rounded, and null where there is none."""
    return [None if not np.isfinite(value) else round(float(value), 4) for value in x]


def compared(table: dict[str, dict[str, list]], method: str, kls: Sequence[float] = KLS) -> list[dict[str, Any]]:
    """How a method's reward at matched KL differs from each other one's, with the standard error over seeds, and
    whether it is at least the other's within that error; nothing, where the method has no points."""
    if method not in table:
        return []
    out = []
    for other in (name for name in table if name != method):
        for i, kl in enumerate(kls):
            a, b = table[method]["mean"][i], table[other]["mean"][i]
            if a is None or b is None:
                continue
            error = float(np.hypot(*[table[name]["error"][i] or 0.0 for name in (method, other)]))
            difference = {"difference": round(a - b, 4), "error": round(error, 4), "holds": a - b >= -error}
            out.append({"other": other, "kl": kl, **difference})
    return out


def shortfalls(results: Sequence[Result], frontier: Frontier) -> dict[str, dict[str, Any]]:
    """By point, averaged over seeds: reward, KL, and how far the reward is below the optimum of the same KL."""
    out: dict[str, dict[str, Any]] = {}
    for name, own in by_point(results).items():
        rewards, kls = (np.array([last(r, figure) for r in own]) for figure in ("reward", "kl"))
        below = reward_at(kls, frontier.optimum.kl, frontier.optimum.reward) - rewards
        out[name] = {
            "method": own[0]["method"],
            "reward": over_seeds(rewards),
            "kl": over_seeds(kls),
            "below the optimum": over_seeds(below),
            **{figure: over_seeds([last(r, figure) for r in own])[0] for figure in ("length", "repeated", "entropy")},
        }
    return out


def by_point(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by their point's name, each with all of its seeds."""
    out: dict[str, list[Result]] = {}
    for result in results:
        out.setdefault(result["name"].rpartition("-seed")[0], []).append(result)
    return out


def over_seeds(values: np.ndarray | Sequence[float]) -> list[float | None]:
    """A mean over seeds and its standard error, as JSON has them."""
    found = estimate(values)
    return numbers(np.array([found.mean, found.error]))


def plot_frontier(path: Path, results: Sequence[Result], frontier: Frontier, title: str, limit: float = 6.0) -> None:
    """Reward against KL: the optimum, Best-of-N, and every point with standard errors and, faintly, the way to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    order = np.argsort(frontier.optimum.kl)
    kl, reward = frontier.optimum.kl[order], frontier.optimum.reward[order]
    sure = frontier.effective[order] >= TRUSTED
    axis.plot(kl[sure], reward[sure], color="black", label="optimum")
    axis.plot(kl[~sure], reward[~sure], color="black", linestyle="--")
    best = frontier.best_of_n
    axis.plot(best.kl, best.reward, color="grey", marker="^", markersize=5, linestyle=":", label="Best-of-N (bound)")
    for i, method in enumerate(dict.fromkeys(r["method"] for r in results)):
        for j, result in enumerate([r for r in results if r["method"] == method]):
            x, y = ([e[name]["mean"] for e in result["curve"]] for name in ("kl", "reward"))
            errors = {f"{a}err": result["curve"][-1][name]["error"] for a, name in (("x", "kl"), ("y", "reward"))}
            axis.plot(x, y, color=f"C{i}", linewidth=0.6, alpha=0.3)
            label = None if j else method
            axis.errorbar(x[-1], y[-1], **errors, color=f"C{i}", marker="osDPXv*<>"[i % 9], markersize=5, label=label)
    far = sum(last(r, "kl") > limit for r in results)
    axis.set(xlabel="KL(policy || reference), nats a completion", ylabel="mean reward", title=title)
    axis.set_xlim(-0.1, limit)
    if far:
        axis.text(0.99, 0.02, f"{far} of {len(results)} points lie further right", transform=axis.transAxes, ha="right")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.06))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], output: Path | None = None) -> None:
    """Print a table, and write it as Markdown."""
    from rich.table import Table

    from dpojax.progress import console

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    cells = [[cell(value) for value in row] for row in rows]
    for row in cells:
        table.add_row(*row)
    console.print(table)
    if output is not None:
        lines = ["| " + " | ".join(row) + " |" for row in (list(header), ["---"] * len(header), *cells)]
        output.write_text(f"{title}\n\n" + "\n".join(lines) + "\n")


def cell(value: Any) -> str:
    """A number, or a mean and its error, as a table has them."""
    if isinstance(value, list | tuple):
        mean, error = value
        return "" if mean is None else f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def averaged(results: Sequence[Result], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By point, figures of its last evaluation: means over seeds, and their standard errors."""
    return {
        name: {"method": own[0]["method"]} | {figure: over_seeds([last(r, figure) for r in own]) for figure in names}
        for name, own in by_point(results).items()
    }


def by_step(results: Sequence[Result], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A figure along the way, of the seeds of one point: steps, means over seeds, and their standard errors."""
    steps = np.array([e["step"] for e in results[0]["curve"]])
    values = np.array([[e[name]["mean"] for e in r["curve"]] for r in results])
    found = [estimate(column) for column in values.T]
    return steps, np.array([one.mean for one in found]), np.array([one.error for one in found])


Series = dict[str, tuple[Any, Any, Any]]
"""By label: x, y, and y's errors."""


def panels_by_step(results: Sequence[Result], names: Sequence[str]) -> dict[str, Series]:
    """A panel for each figure: what it is along the way, by method; a method has one point's seeds here."""
    methods = dict.fromkeys(r["method"] for r in results)
    return {name: {m: by_step([r for r in results if r["method"] == m], name) for m in methods} for name in names}


def plot_panels(path: Path, panels: dict[str, Series], xlabel: str, title: str, logx: bool = False) -> None:
    """Lines with error bars, a panel for each figure; all panels have the same labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 0.8, 3.4), layout="constrained")
    for axis, (name, series) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for i, (label, (x, y, error)) in enumerate(series.items()):
            error = np.nan_to_num(np.asarray(error, float))
            axis.errorbar(x, y, yerr=error, color=f"C{i % 10}", marker="osDPXv*<>"[i % 9], markersize=4, label=label)
        axis.set(title=name, xlabel=xlabel, xscale="log" if logx else "linear")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_points(table: dict[str, dict[str, Any]], names: Sequence[str], output: Path, title: str) -> None:
    """Print points' figures as a table, and write it as points.md."""
    rows = [[point, *(row[name] for name in names)] for point, row in table.items()]
    show_table(f"{title}; ± is the standard error over seeds", ["point", *names], rows, output / "points.md")


def show_matched(table: dict[str, dict[str, list]], frontier: Frontier, output: Path) -> None:
    """Print rewards at matched KL, beside Best-of-N's and the optimum's, and write them as matched.md."""
    rows: list[list[Any]] = [[method, *zip(row["mean"], row["error"], strict=True)] for method, row in table.items()]
    for name, curve in (("Best-of-N", frontier.best_of_n), ("optimum", frontier.optimum)):
        rows.append([name, *numbers(reward_at(np.array(KLS), curve.kl, curve.reward))])
    header = ["method", *(f"KL {kl:g}" for kl in KLS)]
    show_table("Mean reward at matched KL; ± is the standard error over seeds", header, rows, output / "matched.md")


def show_shortfalls(
    config: Any, world: Any, results: Sequence[Result], picture: Path, title: str, heading: str
) -> dict[str, dict[str, Any]]:
    """Points' shortfalls below the optimum (:func:`shortfalls`).

    The frontier is drawn under a title, and the table printed under a heading.
    """
    frontier = frontier_of(world.frontier.rewards, config.setting.scale)
    plot_frontier(picture, results, frontier, title)
    table = shortfalls(results, frontier)
    show_points(table, ("reward", "kl", "below the optimum", "length", "repeated"), picture.parent, heading)
    return table
