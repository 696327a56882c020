"""What happens to the likelihood of the chosen side? Log-ratios of held-out pairs, followed through training.

    python -m experiments.likelihood --processes 2

DPO's loss only asks that the chosen completion gains on the rejected one; both may lose (likelihood displacement;
Razin et al. 2024, arXiv 2410.08847). Pairs of held-out prompts are sampled from the reference and labelled as those of
training are. Figures are means of log pi(y|x) - log pi_ref(y|x), nats.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpojax.data import draw_preferences
from dpojax.evaluate import estimate
from dpojax.logprobs import completion_logps
from experiments.figures import Result, averaged, panels_by_step, plot_panels, show_points
from experiments.measure import Measured, make_measure
from experiments.points import Point
from experiments.sweep import Experiment, SweepConfig, main
from experiments.world import World

LOSSES = {
    "DPO": ("sigmoid", 0.5),
    "IPO": ("ipo(length_normalize=False)", 0.2),
    "DPO + 0.1 SFT": ("sigmoid+0.1*sft", 0.5),
    "DPOP": ("dpop", 0.5),
    "Cal-DPO": ("cal_dpo", 0.5),
}
FIGURES = ("chosen", "rejected", "reward", "kl")
SIDES = 4  # completions of a prompt, of which all pairs are made


def points(config: SweepConfig) -> list[Point]:
    """Every objective."""
    return [
        Point(name=f"{label}-seed{seed}".replace(" ", ""), method=label, loss=loss, beta=beta, seed=seed)
        for label, (loss, beta) in LOSSES.items()
        for seed in config.seeds
    ]


def make_side_measure(world: World) -> Callable[[Any, int], Measured]:
    """Log-ratios of held-out pairs' sides, beside what :func:`~experiments.measure.make_measure` measures."""
    fresh, setting = make_measure(world), world.setting
    known = world.frontier
    samples = jax.tree.map(lambda x: x[:, :SIDES], known.samples)
    pairs = draw_preferences(known.rewards[:, :SIDES], labels=setting.labels, scale=setting.scale, seed=1)
    batch = world.batch(known.prompts, samples)
    logps = jax.jit(lambda params: completion_logps(world.apply_fn, params, batch, mesh=world.mesh))
    ref = np.asarray(logps(world.reference.params))

    def measure(params: Any, seed: int) -> Measured:
        sides = pairs.sides(np.asarray(logps(params)) - ref)
        figures, texts = fresh(params, seed)
        of_sides = {
            name: dataclasses.asdict(estimate(sides[:, i], pairs.prompt.tolist()))
            for i, name in enumerate(("chosen", "rejected"))
        }
        return Measured(figures | of_sides, texts)

    return measure


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Log-ratios by step."""
    panels = panels_by_step(results, FIGURES)
    plot_panels(output / "likelihood.png", panels, "step", "Log-ratios of held-out pairs, nats, and fresh samples")
    table = averaged(results, FIGURES)
    show_points(table, FIGURES, output, "At the end")
    return {"seeds": list(config.seeds), "points": table}


EXPERIMENT = Experiment(
    name="likelihood",
    doc=__doc__,
    points=points,
    show=show,
    measure=make_side_measure,
    changes={"tiny": {"evaluations": 6, "steps": 300}},
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
