"""What wrong labels cost: DPO, conservative DPO, robust DPO and IPO with 0 to 40 % of the labels turned round.

    python -m experiments.label_noise --processes 2

Conservative DPO (label_smoothing; Mitchell 2023) and robust DPO (Chowdhury et al. 2024, arXiv 2403.00409) are told the
rate. Labels are turned round after they were drawn, so that rate comes on top of the Bradley-Terry model's own.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import Result, averaged, plot_panels, show_points
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
FIGURES = ("reward", "kl", "length")


def losses(rate: float) -> dict[str, tuple[str, float]]:
    """Objectives that know the rate, where they can, and their beta."""
    told = f"(label_smoothing={rate:g})"
    return {
        "DPO": ("sigmoid", 1.0),
        "conservative": (f"sigmoid{told}", 1.0),
        "robust": (f"robust{told}", 1.0),
        "IPO": ("ipo(length_normalize=False)", 0.3),
    }


def points(config: SweepConfig) -> list[Point]:
    """Every objective at every rate."""
    return [
        Point(name=f"{label}-noise{rate:g}-seed{seed}", method=label, loss=loss, beta=beta, label_noise=rate, seed=seed)
        for label in losses(0.1)
        for rate in RATES
        for loss, beta in [losses(rate)[label]]
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Reward and KL by rate."""
    table, panels = averaged(results, FIGURES), dict[str, Any]()
    for name in ("reward", "kl"):
        panels[name] = {}
        for label in losses(0.1):
            there = [rate for rate in RATES if f"{label}-noise{rate:g}" in table]
            if there:
                rows = np.array([table[f"{label}-noise{rate:g}"][name] for rate in there], float)
                panels[name][label] = (there, *rows.T)
    plot_panels(output / "label_noise.png", panels, "share of labels turned round", "Wrong labels")
    show_points(table, FIGURES, output, "By objective and share of wrong labels")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(name="label_noise", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
