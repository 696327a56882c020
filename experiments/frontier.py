"""Controlled sentiment: how much reward each method has for how much KL (DPO, arXiv 2305.18290, section 6.1, Figure 2).

    python -m experiments.frontier --processes 2                      tiny: minutes on two CPU cores
    python -m experiments.frontier --preset small --processes 1       SmolLM2-135M: hours on them
    python -m experiments.frontier --preset paper --plan v5e:2x4      compile the paper's step for a slice of a pod
    python -m experiments.frontier --preset paper --output DIR        and run it: the same command on every slice

A policy is aligned to positive sentiment by DPO at several beta, by RLOO and PPO with several KL coefficients, on the
true reward and on one learned from the pairs, by Unlikelihood and by Preferred-FT. Each is measured on fresh samples
for held-out prompts. Beside them stand Best-of-N, and the optimum, which importance sampling from the reference gives.
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
from experiments.setting import Preset
from experiments.sweep import Experiment, SweepConfig, main

DPO_BETAS: dict[Preset, tuple[float, ...]] = {
    "tiny": (5.0, 2.0, 1.0, 0.5, 0.1, 0.05),
    "small": (1.0, 0.3, 0.1),
    "paper": (5.0, 1.0, 0.1, 0.05),
}
RL_BETAS: dict[Preset, dict[tuple[str, str], tuple[float, ...]]] = {
    "tiny": {(loss, reward): (5.0, 1.0, 0.3) for loss in ("rloo", "ppo") for reward in ("true", "learned")},
    "small": {("rloo", "true"): (1.0, 0.3), ("rloo", "learned"): (0.3,), ("ppo", "true"): (0.3,)},
    "paper": {(loss, reward): (1.0, 0.3, 0.1, 0.05) for loss in ("rloo", "ppo") for reward in ("true", "learned")},
}
"""KL coefficients, by method and by whether the reward is the true one or learned."""
ALPHAS: dict[Preset, tuple[float, ...]] = {"tiny": (0.1, 0.5, 1.0), "small": (0.1, 0.5), "paper": (0.05, 0.1, 0.5, 1.0)}


def points(config: SweepConfig) -> list[Point]:
    """Every method at several strengths, all seeds."""
    preset, out = config.preset, []
    for seed in config.seeds:
        for beta in DPO_BETAS[preset]:
            out.append(Point(name=f"dpo-beta{beta:g}-seed{seed}", method="DPO", beta=beta, seed=seed))
    for (loss, reward), betas in RL_BETAS[preset].items():
        method = f"{loss.upper()}, {reward} reward"
        for seed in config.seeds:
            for beta in betas:
                name = f"{loss}-{reward}-beta{beta:g}-seed{seed}"
                out.append(Point(name=name, method=method, loss=loss, reward=reward, beta=beta, seed=seed))  # type: ignore[arg-type]
    for alpha in ALPHAS[preset]:
        for seed in config.seeds:
            name, loss = f"unlikelihood-alpha{alpha:g}-seed{seed}", f"unlikelihood(alpha={alpha:g})"
            out.append(Point(name=name, method="Unlikelihood", loss=loss, seed=seed))
    for seed in config.seeds:
        out.append(Point(name=f"preferred_ft-seed{seed}", method="Preferred-FT", loss="preferred_ft", seed=seed))
    return out


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """The frontier's figure, rewards at matched KL, and how far each point is below the optimum."""
    rewards = world.frontier.rewards
    frontier, start = frontier_of(rewards, config.setting.scale), float(rewards.mean())
    plot_frontier(output / "frontier.png", results, frontier, f"Controlled sentiment, {config.preset}")
    table, each = matched(results, frontier), shortfalls(results, frontier)
    optimum, best = frontier.optimum, frontier.best_of_n
    show_matched(table, frontier, output)
    show_points(each, ("reward", "kl", "below the optimum", "length", "repeated", "entropy"), output, "Points")
    return {
        "seeds": list(config.seeds),
        "reference reward": round(start, 4),
        "kl": list(KLS),
        "reward at matched kl": table,
        "dpo against": compared(table, "DPO"),
        "points": each,
        "optimum": {name: [round(float(x), 4) for x in values] for name, values in optimum._asdict().items()},
        "effective samples": [round(float(x), 1) for x in frontier.effective],
        "best of n": {name: [round(float(x), 4) for x in values] for name, values in best._asdict().items()},
    }


EXPERIMENT = Experiment(name="frontier", doc=__doc__, points=points, show=show)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
