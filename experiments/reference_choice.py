"""Which reference? The SFT model, one that imitated the chosen completions, one before SFT's end, and one that moves.

    python -m experiments.reference_choice --processes 2

The pairs are the SFT model's samples in every case. Where no SFT model is at hand, the paper (arXiv 2305.18290, section
4) proposes Preferred-FT on the chosen completions for the reference. TR-DPO (arXiv 2404.09656) moves it towards the
policy. KL is measured from the SFT model always.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import Result, show_shortfalls
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

REFERENCES = {
    "sft": "SFT",
    "preferred_ft": "Preferred-FT on the chosen",
    "base": "before SFT's end",
    "moving": "moving (TR-DPO)",
}
BETAS = (1.0, 0.5)


def points(config: SweepConfig) -> list[Point]:
    """Every reference at two strengths."""
    return [
        Point(name=f"{ref}-beta{beta:g}-seed{seed}", method=label, reference=ref, beta=beta, seed=seed)  # type: ignore[arg-type]
        for ref, label in REFERENCES.items()
        for beta in BETAS
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """The frontier of the SFT model, and where each reference leads."""
    picture, title = output / "reference_choice.png", "DPO from several references"
    table = show_shortfalls(config, world, results, picture, title, heading="By reference")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(
    name="reference_choice", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}}
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
