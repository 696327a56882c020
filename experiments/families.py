"""Which objective has the most reward for its KL: sigmoid, hinge, IPO and five more, at matched KL.

    python -m experiments.families --processes 2

Objectives scale beta differently, so they are compared where their KL is the same: each is trained at several beta, and
its rewards are joined by straight lines. IPO is on sums of log-probabilities here, as DPO is.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import (
    KLS,
    Result,
    compared,
    frontier_of,
    matched,
    plot_frontier,
    shortfalls,
    show_matched,
    show_points,
)
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

LOSSES = {
    "DPO": "sigmoid",
    "hinge": "hinge",
    "IPO": "ipo(length_normalize=False)",
    "EXO": "exo_pair",
    "NCA": "nca_pair",
    "APO-zero": "apo_zero",
    "SPPO": "sppo_hard",
    "DPO + 0.1 SFT": "sigmoid+0.1*sft",
}
BETAS = (2.0, 1.0, 0.5, 0.2)


def points(config: SweepConfig) -> list[Point]:
    """Every objective at every beta."""
    return [
        Point(name=f"{label}-beta{beta:g}-seed{seed}".replace(" ", ""), method=label, loss=loss, beta=beta, seed=seed)
        for label, loss in LOSSES.items()
        for seed in config.seeds
        for beta in BETAS
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Rewards at matched KL, and the frontier."""
    frontier = frontier_of(world.frontier.rewards, config.setting.scale)
    plot_frontier(output / "families.png", results, frontier, "Objectives by reward and KL")
    table, each = matched(results, frontier), shortfalls(results, frontier)
    show_matched(table, frontier, output)
    show_points(each, ("reward", "kl", "below the optimum", "length", "repeated", "entropy"), output, "Points")
    against = compared(table, "DPO")
    return {"kl": list(KLS), "reward at matched kl": table, "dpo against": against, "points": each}


EXPERIMENT = Experiment(name="families", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
