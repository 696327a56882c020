"""Does it help to sample anew? Three rounds of sampling from the policy, labelling and DPO, against one offline run.

    python -m experiments.on_policy --processes 2

All runs have as many pairs and steps in total. In every round pairs are drawn from the policy as it is. The
reference is the policy of the round's beginning (as in iterative DPO), or the SFT model throughout.
"""

import sys
from pathlib import Path
from typing import Any

from experiments.figures import Result, show_shortfalls
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main

WAYS = {
    "offline": {"rounds": 1},
    "3 rounds, new reference": {"rounds": 3},
    "3 rounds, SFT reference": {"rounds": 3, "new_reference": False},
}
BETAS = (1.0, 0.5)


def points(config: SweepConfig) -> list[Point]:
    """Every way at two strengths."""
    return [
        Point(name=f"{way}-beta{beta:g}-seed{seed}".replace(" ", "-"), method=way, beta=beta, seed=seed, **more)  # type: ignore[arg-type]
        for way, more in WAYS.items()
        for beta in BETAS
        for seed in config.seeds
    ]


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """The frontier; KL is that from the SFT model, whatever the reference was."""
    title = "Offline and on-policy DPO"
    table = show_shortfalls(config, world, results, output / "on_policy.png", title, heading=title)
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(name="on_policy", doc=__doc__, points=points, show=show, changes={"tiny": {"steps": 300}})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
