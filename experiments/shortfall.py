"""What keeps DPO below the optimum? A wider model, fewer pairs, other rates, imitation beside it, smoothed labels.

    python -m experiments.shortfall --processes 2

Each variant changes one thing of DPO at beta 0.5. How far its reward is below the optimum of the same KL is compared; a
wider model has a reference, samples and an optimum of its own.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import Result, frontier_of, plot_frontier, shortfalls, show_points
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

VARIANTS: dict[str, dict[str, Any]] = {
    "DPO": {},
    "twice the width": {"width": 128},
    "a tenth of the pairs": {"pairs": 1_920},
    "half the rate": {"learning_rate": 2.5e-4},
    "twice the rate": {"learning_rate": 1e-3},
    "four times the steps": {"steps": 1_200},
    "0.1 SFT beside it": {"loss": "sigmoid+0.1*sft"},
    "labels smoothed by 0.1": {"loss": "sigmoid(label_smoothing=0.1)"},
    "3 rounds, new reference": {"rounds": 3},
}


def points(config: SweepConfig) -> list[Point]:
    """Every variant."""
    return [
        Point(name=f"{label}-seed{seed}".replace(" ", "-"), method=label, seed=seed, **{"beta": 0.5, **more})
        for label, more in VARIANTS.items()
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """How far each variant is below its own optimum."""
    scale = config.setting.scale
    plot_frontier(output / "shortfall.png", results, frontier_of(world.frontier.rewards, scale), "Variants of DPO")
    table: dict[str, dict[str, Any]] = {}
    for width in dict.fromkeys(r["config"]["width"] for r in results):
        own = [r for r in results if r["config"]["width"] == width]
        table |= shortfalls(own, frontier_of(world.of_width(width).frontier.rewards, scale))
    show_points(table, ("below the optimum", "reward", "kl", "length", "repeated"), output, "Variants of DPO, beta 0.5")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(name="shortfall", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
