"""Controlled sentiment: how much reward each method has for how much KL (DPO, arXiv 2305.18290, section 6.1, Figure 2).

    python -m experiments.frontier --processes 2                      tiny: minutes on two CPU cores
    python -m experiments.frontier --preset small --processes 1       SmolLM2-135M: hours on them
    python -m experiments.frontier --preset paper --plan v5e:2x4      compile the paper's step for a slice of a pod
    python -m experiments.frontier --preset paper --output DIR        and run it: the same command on every slice

A policy is aligned to positive sentiment by DPO at several beta, by RLOO and PPO with several KL coefficients, on the
true reward and on one learned from the pairs, by Unlikelihood and by Preferred-FT. Each is measured on fresh samples
for held-out prompts. Beside them stand Best-of-N, and the optimum, which importance sampling from the reference gives.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.evaluate import reward_at
from experiments.figures import KLS, Result, compared, frontier_of, matched, plot_frontier, shortfalls, show_table
from experiments.points import Point
from experiments.setting import Preset
from experiments.sweep import SweepConfig, main

DPO_BETAS: dict[Preset, tuple[float, ...]] = {
    "tiny": (5.0, 1.0, 0.3, 0.1, 0.05),
    "small": (1.0, 0.3, 0.1),
    "paper": (5.0, 1.0, 0.1, 0.05),
}
RL_BETAS: dict[Preset, tuple[float, ...]] = {
    "tiny": (5.0, 1.0, 0.3),
    "small": (1.0, 0.3),
    "paper": (1.0, 0.3, 0.1, 0.05),
}
ALPHAS: dict[Preset, tuple[float, ...]] = {"tiny": (0.1, 0.5, 1.0), "small": (0.1, 0.5), "paper": (0.05, 0.1, 0.5, 1.0)}


@dataclasses.dataclass(frozen=True)
class FrontierExperiment:
    """Methods by their numbers; see :class:`~experiments.sweep.Experiment`."""

    name: str = "frontier"

    def changes(self, preset: Preset) -> dict[str, Any]:
        return {}

    def points(self, config: SweepConfig) -> list[Point]:
        preset, out = config.preset, []
        for seed in config.seeds:
            for beta in DPO_BETAS[preset]:
                out.append(Point(name=f"dpo-beta{beta:g}-seed{seed}", method="DPO", beta=beta, seed=seed))
        for loss in ("rloo", "ppo"):
            for reward in ("true", "learned"):
                for seed in config.seeds:
                    for beta in RL_BETAS[preset]:
                        name = f"{loss}-{reward}-beta{beta:g}-seed{seed}"
                        method = f"{loss.upper()}, {reward} reward"
                        out.append(Point(name=name, method=method, loss=loss, reward=reward, beta=beta, seed=seed))  # type: ignore[arg-type]
        for alpha in ALPHAS[preset]:
            for seed in config.seeds:
                name, loss = f"unlikelihood-alpha{alpha:g}-seed{seed}", f"unlikelihood(alpha={alpha:g})"
                out.append(Point(name=name, method="Unlikelihood", loss=loss, seed=seed))
        for seed in config.seeds:
            out.append(Point(name=f"preferred_ft-seed{seed}", method="Preferred-FT", loss="preferred_ft", seed=seed))
        return out

    def show(self, config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
        rewards = world.frontier.rewards
        frontier, start = frontier_of(rewards, config.setting.scale), float(rewards.mean())
        plot_frontier(output / "frontier.png", results, frontier, f"Controlled sentiment, {config.preset}")
        table, points = matched(results, start), shortfalls(results, frontier)
        header = ["method", *(f"KL {kl:g}" for kl in KLS)]
        rows = [[method, *zip(row["mean"], row["error"], strict=True)] for method, row in table.items()]
        optimum, best = frontier.optimum, frontier.best_of_n
        rows.append(["Best-of-N", *(float(x) for x in reward_at(np.array(KLS), best.kl, best.reward))])
        rows.append(["optimum", *(float(x) for x in reward_at(np.array(KLS), optimum.kl, optimum.reward))])
        show_table("Mean reward at matched KL; ± is the standard error over seeds", header, rows, output / "matched.md")
        header = ["point", "reward", "KL", "below the optimum", "tokens", "repeated", "entropy"]
        fields = ("reward", "kl", "below the optimum", "length", "repeated", "entropy")
        rows = [[name, *(row[field] for field in fields)] for name, row in points.items()]
        show_table("Points, means over seeds", header, rows, output / "points.md")
        return {
            "seeds": list(config.seeds),
            "reference reward": round(start, 4),
            "kl": list(KLS),
            "reward at matched kl": table,
            "dpo against": compared(table, "DPO"),
            "points": points,
            "optimum": {name: [round(float(x), 4) for x in values] for name, values in optimum._asdict().items()},
            "effective samples": [round(float(x), 1) for x in frontier.effective],
            "best of n": {name: [round(float(x), 4) for x in values] for name, values in best._asdict().items()},
        }


EXPERIMENT = FrontierExperiment()

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
