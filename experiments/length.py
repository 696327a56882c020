"""Does DPO lengthen completions? Summed against length-normalised log-probabilities, at 24 tokens of room.

    python -m experiments.length --processes 2

The reward is bounded and does not count words, but longer texts have room for more words of feeling. Summed log-ratios
pay for every token of them; sigmoid_norm and SimPO compare means, R-DPO and LD-DPO take length out in other ways.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import Result, averaged, panels_by_step, plot_panels, show_points
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

LOSSES = {
    "DPO": ("sigmoid", (1.0, 0.3)),
    "length-normalised DPO": ("sigmoid_norm", (10.0, 3.0)),
    "SimPO": ("simpo(simpo_gamma=0.5)", (5.0, 2.0)),
    "R-DPO": ("r_dpo", (1.0, 0.3)),
    "LD-DPO": ("ld_dpo", (1.0, 0.3)),
}
FIGURES = ("length", "reward", "kl", "repeated")


def points(config: SweepConfig) -> list[Point]:
    """Every objective at two strengths."""
    return [
        Point(name=f"{label}-beta{beta:g}-seed{seed}".replace(" ", "-"), method=label, loss=loss, beta=beta, seed=seed)
        for label, (loss, betas) in LOSSES.items()
        for beta in betas
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Length, reward and KL by step, at the stronger of the two betas."""
    stronger = [r for r in results if r["config"]["beta"] == LOSSES[r["method"]][1][-1]]
    panels = panels_by_step(stronger, ("length", "reward", "kl"))
    plot_panels(output / "length.png", panels, "step", "Length of completions")
    table, start = averaged(results, FIGURES), float(world.frontier.samples.lengths.mean())
    show_points(table, FIGURES, output, f"Tokens of a completion (the reference: {start:.2f})")
    return {"seeds": list(config.seeds), "reference length": round(start, 3), "points": table}


EXPERIMENT = Experiment(
    name="length", doc=__doc__, points=points, show=show, changes={"tiny": {"new_tokens": 24, "steps": 300}}
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
