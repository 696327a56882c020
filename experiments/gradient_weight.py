"""What the weight in DPO's gradient is for: without it the policy degenerates (DPO, arXiv 2305.18290, section 4).

    python -m experiments.gradient_weight --processes 2

DPO's gradient moves each pair by ``sigma(r_l - r_w)``, how wrongly the implicit rewards order it. The objective
``unweighted`` leaves that out: every pair pushes on for ever. Both are trained at the same beta and rate; reward, KL,
the share of repeated tokens and the entropy of samples are followed.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import Result, averaged, panels_by_step, plot_panels, show_points
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

FIGURES = ("reward", "kl", "repeated", "entropy", "length")


def points(config: SweepConfig) -> list[Point]:
    """With the weight and without it."""
    beta = 0.1 if config.preset == "paper" else 0.3
    return [
        Point(name=f"{loss}-seed{seed}", method=label, loss=loss, beta=beta, seed=seed)
        for loss, label in (("sigmoid", "DPO"), ("unweighted", "without the weight"))
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Figures by step, and those of the end."""
    panels = panels_by_step(results, FIGURES[:4])
    plot_panels(output / "gradient_weight.png", panels, "step", "DPO with and without the weight of its gradient")
    table = averaged(results, FIGURES)
    show_points(table, FIGURES, output, "At the end")
    texts = {r["name"]: r["texts"] for r in results if r["seed"] == config.seeds[0]}
    return {"seeds": list(config.seeds), "points": table, "texts": texts}


EXPERIMENT = Experiment(
    name="gradient_weight", doc=__doc__, points=points, show=show, changes={"tiny": {"evaluations": 6, "steps": 300}}
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
