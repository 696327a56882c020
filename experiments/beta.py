"""What beta does: reward and KL of DPO against the optimum of the same beta (DPO, arXiv 2305.18290, equation 4).

    python -m experiments.beta --processes 2

For every beta there is a known optimum, whose reward and KL importance sampling from the reference estimates. A policy
that DPO trains on pairs of that reward should be there; the figure shows where it is.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.evaluate import tilted
from experiments.figures import Result, averaged, numbers, plot_panels, show_points
from experiments.points import Point
from experiments.setting import Preset
from experiments.sweep import Experiment, SweepConfig, main

BETAS: dict[Preset, tuple[float, ...]] = {
    "tiny": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    "small": (0.1, 0.3, 1.0, 3.0),
    "paper": (0.01, 0.05, 0.1, 0.5, 1.0, 5.0),
}
FIGURES = ("reward", "kl", "length", "repeated", "entropy")


def points(config: SweepConfig) -> list[Point]:
    """DPO at every beta."""
    return [
        Point(name=f"beta{beta:g}-seed{seed}", method="DPO", beta=beta, seed=seed)
        for beta in BETAS[config.preset]
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Reward and KL by beta, beside the optimum's."""
    table, betas = averaged(results, FIGURES), np.array(list(dict.fromkeys(r["config"]["beta"] for r in results)))
    scale, rewards = config.setting.scale, world.frontier.rewards
    best = [tilted(scale * rewards, beta) for beta in betas]
    optimum = {
        "reward": np.array([one.reward.mean() / scale for one in best]),
        "kl": np.array([one.kl.mean() for one in best]),
    }
    panels: dict[str, Any] = {}
    for name, known in optimum.items():
        mean, error = np.array([row[name] for row in table.values()], float).T
        panels[name] = {"DPO": (betas, mean, error), "optimum": (betas, known, 0 * known)}
    plot_panels(output / "beta.png", panels, "beta", "DPO and the optimum, by beta", logx=True)
    for row, i in zip(table.values(), range(len(betas)), strict=True):
        row["optimum's reward"], row["optimum's kl"] = numbers(np.array([optimum[name][i] for name in optimum]))
    show_points(table, ("reward", "optimum's reward", "kl", "optimum's kl", *FIGURES[2:]), output, "DPO by beta")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(name="beta", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
