"""How good is Best-of-N, and how far from the reference? Its exact KL, its bound, its reward (DPO, section 6.3).

    python -m experiments.best_of_n

Two parts. On tables of random policies and rewards everything is known: the exact KL of Best-of-N stays below
``log N - (N - 1) / N``, and near it where no completion is likely. On the sentiment task, the expected reward of
Best-of-N is computed from all samples of the reference by order statistics, compared with the best of N fresh samples,
and set beside the optimum of the same KL.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import theory
from dpojax.evaluate import best_of_n_kl, estimate, reward_at
from experiments.figures import Result, frontier_of, numbers, plot_panels, show_table
from experiments.sweep import Experiment, SweepConfig, main

NS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (4, 32, 1024)  # completions of a table
PROMPTS = 16


def show(config: SweepConfig, world: Any, results: list[Result], output: Path) -> dict[str, Any]:
    """Exact KL against the bound, and reward against the optimum's."""
    bounds = np.array([best_of_n_kl(n) for n in NS])
    tables: dict[str, Any] = {"bound": (NS, bounds, 0 * bounds)}
    for size in SIZES:
        keys = jax.random.split(jax.random.key(size))
        ref = jax.nn.log_softmax(jax.random.normal(keys[0], (PROMPTS, size)), axis=-1)
        rewards = jax.random.normal(keys[1], (PROMPTS, size))
        each = [theory.kl(theory.best_of_n_policy(rewards, ref, n), ref) for n in NS]
        means = [estimate(np.asarray(kl)) for kl in each]
        tables[f"{size} completions"] = (NS, [one.mean for one in means], [one.error for one in means])
        assert all(float(jnp.max(kl)) <= bound + 1e-5 for kl, bound in zip(each, bounds, strict=True))

    known = world.frontier.rewards
    frontier = frontier_of(known, config.setting.scale)
    best = frontier.best_of_n
    fresh = world.draw(world.reference.params, world.prompts("held_out"), int(best.of[-1]), seed=77).rewards
    drawn = [estimate(fresh.reshape(len(fresh), -1, int(n)).max(axis=-1).mean(axis=-1)) for n in best.of]
    optimum = reward_at(best.kl, frontier.optimum.kl, frontier.optimum.reward)
    panels = {
        "KL, nats": tables,
        "reward": {
            "order statistics": (best.of, best.reward, 0 * best.reward),
            "fresh samples": (best.of, [one.mean for one in drawn], [one.error for one in drawn]),
            "optimum at the bound": (best.of, optimum, 0 * optimum),
        },
    }
    plot_panels(output / "best_of_n.png", panels, "N", "Best-of-N", logx=True)
    rows = [
        [int(n), float(kl), float(reward), (one.mean, one.error), float(most)]
        for n, kl, reward, one, most in zip(best.of, best.kl, best.reward, drawn, optimum, strict=True)
    ]
    header = ["N", "KL at most", "reward", "of fresh samples", "optimum at that KL"]
    show_table("Best-of-N; ± is the standard error over prompts", header, rows, output / "points.md")
    exact = {name: numbers(np.array(series[1])) for name, series in tables.items()}
    return {"n": list(NS), "exact kl": exact, "reward": [dict(zip(header, row, strict=True)) for row in rows]}


EXPERIMENT = Experiment(name="best_of_n", doc=__doc__, points=lambda config: [], show=show)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
