"""How many pairs does a reward model need? Its accuracy against the true reward, by the number of pairs.

    python -m experiments.reward_accuracy --processes 2

A Bradley-Terry head on the SFT model is trained by maximum likelihood (DPO, arXiv 2305.18290, equation 2). It then
orders fresh completions of held-out prompts: ``accuracy`` is how often as the true reward does, ``on labels`` how often
as labels drawn from it, which no model can do better than ``best on labels``; ``correlation`` is within a prompt.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpojax.evaluate import estimate
from dpojax.logprobs import completion_rewards
from dpojax.models import as_reward_model
from experiments.figures import Result, averaged, plot_panels, show_points
from experiments.measure import Measured
from experiments.points import Point
from experiments.setting import Preset
from experiments.sweep import Experiment, SweepConfig, main
from experiments.world import World

PAIRS: dict[Preset, tuple[int, ...]] = {
    "tiny": (100, 400, 1_600, 6_400, 25_600),
    "small": (100, 400, 1_200),
    "paper": (1_000, 10_000, 100_000),
}
FIGURES = ("accuracy", "on labels", "best on labels", "correlation")
SAMPLES = 16


def points(config: SweepConfig) -> list[Point]:
    """Every number of pairs; each is passed through at most four times."""
    setting = config.setting
    return [
        Point(
            name=f"pairs{n}-seed{seed}",
            method="reward model",
            loss="reward_model",
            pairs=n,
            steps=min(setting.reward_steps, max(1, 4 * n // setting.batch_size)),
            seed=seed,
        )
        for n in PAIRS[config.preset]
        for seed in config.seeds
    ]


def make_accuracy(world: World) -> Callable[[Any, int], Measured]:
    """How a reward model orders completions of held-out prompts, prompt by prompt."""
    known, scale = world.frontier, world.setting.scale
    samples, true = jax.tree.map(lambda x: x[:, :SAMPLES], known.samples), known.rewards[:, :SAMPLES]
    batch = world.batch(known.prompts, samples)
    apply_fn = world.apply_of(as_reward_model(world.reference, world.mesh).config)
    score = jax.jit(lambda params: completion_rewards(apply_fn, params, batch))
    i, j = np.triu_indices(true.shape[1], 1)
    gaps = true[:, i] - true[:, j]
    likely = 1 / (1 + np.exp(-scale * gaps))  # that i is labelled the better one

    def measure(params: Any, seed: int) -> Measured:
        own = np.asarray(score(params))[: len(true)]
        says = own[:, i] > own[:, j]
        ordered = gaps != 0
        values = {
            "accuracy": [np.mean((s == (g > 0))[o]) for s, g, o in zip(says, gaps, ordered, strict=True) if o.any()],
            "on labels": np.mean(np.where(says, likely, 1 - likely), axis=1),
            "best on labels": np.mean(np.maximum(likely, 1 - likely), axis=1),
            "correlation": [np.corrcoef(a, b)[0, 1] for a, b, o in zip(own, true, ordered, strict=True) if o.any()],
        }
        return Measured({name: dataclasses.asdict(estimate(np.nan_to_num(x))) for name, x in values.items()}, [])

    return measure


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Accuracy and correlation by the number of pairs."""
    table, pairs = averaged(results, FIGURES), list(dict.fromkeys(r["config"]["pairs"] for r in results))
    series = {name: np.array([table[f"pairs{n}"][name] for n in pairs], float).T for name in FIGURES}
    accuracies = {name: (pairs, *series[name]) for name in FIGURES[:3]}
    panels = {"accuracy": accuracies, "correlation": {"correlation": (pairs, *series["correlation"])}}
    plot_panels(output / "reward_accuracy.png", panels, "pairs", "Reward models by the number of pairs", logx=True)
    show_points(table, FIGURES, output, "Reward models on held-out prompts")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(name="reward_accuracy", doc=__doc__, points=points, show=show, measure=make_accuracy)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
