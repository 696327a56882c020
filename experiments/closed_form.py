"""The theory of DPO in closed form: which policy each objective has, on a space that is enumerated whole.

    python -m experiments.closed_form --output runs/closed_form

Three prompts of five completions each have random rewards and a random reference; preferences are the rewards' exact
Bradley-Terry probabilities, over all pairs. Every objective trains a tabular softmax policy on their expectation, and
its policy is held against theory (dpojax/theory/):

- DPO (sigmoid) has the KL-constrained optimum of the reward, pi_r, which lies on the analytic frontier of reward
  against KL. So has robust, if labels are flipped at the rate that it is told ("robust, flipped").
- IPO has log-ratios that fit (2 p - 1) / (2 beta) best by least squares: for equally likely pairs, each is the mean of
  those numbers over the completions that it is compared with, itself included.
- Hinge has a linear program's solution: log-ratios that differ by whole multiples of 1 / beta.
- The others have optima without a closed form here; unweighted has none. Its row is where Adam stopped: as Adam moves
  all log-ratios equally fast, several completions share the mass, where gradient descent leaves one.

Beside that, gradient descent on the DPO loss and on the same loss without the gradient's weight sigma(r_l - r_w): one
converges; the other's log-ratios grow with every step, until one completion has all the mass.

Hardware and time: two CPU cores, 20 seconds.
Result (docs/closed_form.png): DPO is within 1e-7 of pi_r in total variation, IPO and hinge within 1e-6 of their own
optima. At its own KL the frontier has 0.0006 more reward than IPO's policy, 0.026 more than hinge's and 0.70 more than
that of apo_down, the farthest, where rewards have spread 1. After 2000 steps without the weight KL(reference || policy)
is 616 nats and grows by 0.31 a step; DPO's stands still at 0.83.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dpojax.errors import UserError
from experiments.common import command_line, keep_config

NAMES = (
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "unweighted"),
)
FLIPPED = "robust, flipped"
FLIPS = 0.1  # robust's own default


@dataclasses.dataclass(frozen=True)
class ClosedFormConfig:
    """Train each objective where everything can be enumerated, and measure how far it is from the theory."""

    output: str = "runs/closed_form"
    """Directory for the figure and the metrics."""
    preset: Literal["full", "tiny"] = "full"
    """Sizes: those of the figure, or those of a run of seconds."""
    beta: float = 0.5
    """Strength of the KL penalty."""
    prompts: int | None = None
    """Number of prompts (default: the preset's)."""
    completions: int | None = None
    """Completions of each prompt (default: the preset's)."""
    steps: int | None = None
    """Updates of each objective's policy (default: the preset's)."""
    descent: int | None = None
    """Steps of gradient descent, of DPO and of the ablation without weight (default: the preset's)."""
    seed: int = 0
    """Seed of rewards and reference."""


PRESETS = {
    "full": {"prompts": 3, "completions": 5, "steps": 10_000, "descent": 2_000},
    "tiny": {"prompts": 2, "completions": 3, "steps": 500, "descent": 100},
}


def resolved(config: ClosedFormConfig) -> ClosedFormConfig:
    """The config with the preset's sizes where it names none."""
    return dataclasses.replace(
        config, **{k: v for k, v in PRESETS[config.preset].items() if getattr(config, k) is None}
    )


def check(config: ClosedFormConfig) -> None:
    """Refuse what cannot be computed, in one sentence."""
    least = {"prompts": 1, "completions": 2, "steps": 2, "descent": 2, "seed": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least {low}")
    if not 0 < config.beta < float("inf"):
        raise UserError(f"--beta {config.beta}: must be above 0")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise UserError(f"--output {config.output}: is a file; name a directory")


def gradient_rate(X: int, Y: int, beta: float) -> float:
    """A tenth of the DPO loss's inverse curvature where it is greatest: slow enough for a curve to show the way."""
    return 0.2 * X * (Y - 1) / beta**2  # the curvature is beta^2 / 4 of the Laplacian of equally likely pairs


def train_all(config: ClosedFormConfig, ref: Any, preferences: Any) -> dict[str, Any]:
    """The path of every objective's policy."""
    from dpojax import theory
    from dpojax.losses import LOSSES
    from dpojax.progress import track

    flipped = (1 - FLIPS) * preferences + FLIPS * (1 - preferences)
    plans = {name: (name, preferences) for name in NAMES} | {FLIPPED: ("robust", flipped)}
    paths = {}
    for label, (name, labels) in track(list(plans.items()), "Training"):
        options = {"length_normalize": False} if name == "ipo" else {}
        objective = partial(LOSSES[name], beta=config.beta, **options)
        paths[label] = theory.train(objective, ref, labels, steps=config.steps)
    return paths


def measure(config: ClosedFormConfig, reward: Any, ref: Any, preferences: Any, paths: dict[str, Any]) -> dict[str, Any]:
    """A row of the table for the reference, the optimum and every trained policy."""
    from dpojax import theory

    optimum = theory.optimal_policy(reward, ref, config.beta)
    own = {
        "sigmoid": optimum,
        FLIPPED: optimum,
        "ipo": theory.ipo_optimum(ref, preferences, config.beta),
        "hinge": theory.hinge_optimum(ref, preferences, config.beta),
    }
    policies = {"reference": ref, "pi_r": optimum} | {name: path[-1] for name, path in paths.items()}
    rows = {}
    for name, policy in policies.items():
        divergence, mean = theory.kl(policy, ref).mean(), theory.expected_reward(policy, reward).mean()
        best = theory.frontier_reward(reward, ref, divergence)
        rows[name] = {
            "TV to pi_r": float(theory.total_variation(policy, optimum).max()),
            "TV to own optimum": float(theory.total_variation(policy, own[name]).max()) if name in own else None,
            "reward": float(mean),
            "KL": float(divergence),
            "frontier reward": float(best),
            "gap": float(best - mean),
        }
    return rows


def descend(config: ClosedFormConfig, reward: Any, ref: Any, preferences: Any) -> dict[str, dict[str, list[float]]]:
    """Curves of gradient descent on DPO and on its ablation, at the rate of DPO's curvature."""
    import jax
    import jax.numpy as jnp
    import optax

    from dpojax import theory
    from dpojax.losses import LOSSES

    optimum = theory.optimal_policy(reward, ref, config.beta)
    plain = optax.sgd(gradient_rate(config.prompts, config.completions, config.beta))
    curves = {}
    for name in ("sigmoid", "unweighted"):
        objective = partial(LOSSES[name], beta=config.beta)
        path = theory.train(objective, ref, preferences, steps=config.descent, optimizer=plain)

        def chosen(policy: Any) -> Any:
            pairs, _, weights = theory.all_pairs(policy, ref, preferences)
            return jnp.sum(weights * pairs.chosen)

        figures = {
            "KL(policy || reference)": lambda p: theory.kl(p, ref).mean(),
            "KL(reference || policy)": lambda p: theory.kl(ref, p).mean(),
            "log-probability of chosen": chosen,
            "most likely completion": lambda p: jnp.exp(p).max(axis=-1).mean(),
            "TV to pi_r": lambda p: theory.total_variation(p, optimum).max(),
        }
        curves[name] = {what: jax.vmap(f)(path).tolist() for what, f in figures.items()}
    return curves


SHORT = {"KL(reference || policy)": "KL(ref || policy)", "KL(policy || reference)": "KL(policy || ref)"}
MARKERS = "osD^vP*X<>hdp"


def plot(reward: Any, ref: Any, rows: dict[str, Any], curves: dict[str, Any], path: Path) -> None:
    """The frontier with every policy; the ablation's degeneration against DPO; DPO's way to the optimum."""
    import matplotlib

    matplotlib.use("Agg")
    import jax.numpy as jnp
    import matplotlib.pyplot as plt

    from dpojax import theory

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained", width_ratios=(2, 1.2, 1, 1))
    x, y = theory.frontier(reward, ref, jnp.geomspace(20.0, 0.01, 400))
    axes[0].plot(x, y, color="black", linewidth=1, label="analytic frontier")
    shown = [name for name in rows if name not in ("reference", "pi_r")]
    for i, name in enumerate(shown):
        row = rows[name]
        style = {"marker": MARKERS[i], "color": f"C{i % 10}", "linestyle": "", "markersize": 8}
        axes[0].plot(row["KL"], row["reward"], label=name, markerfacecolor="none", markeredgewidth=1.8, **style)
    axes[0].set(title="reward and KL of each objective's policy", xlabel="KL(policy || reference), nats")
    axes[0].set_ylabel("expected reward")
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    labels = {"sigmoid": "DPO", "unweighted": "without the weight"}
    for i, (name, label) in enumerate(labels.items()):
        for what, style in (("KL(reference || policy)", "-"), ("KL(policy || reference)", ":")):
            axes[1].plot(curves[name][what], color=f"C{i}", linestyle=style, label=f"{label}, {SHORT[what]}")
        axes[2].plot([-v for v in curves[name]["log-probability of chosen"]], color=f"C{i}", label=label)
    axes[1].set(title="divergence, nats", xlabel="gradient step", xscale="log", yscale="log")
    axes[1].set_ylim(top=3e5)  # room for the legend
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    axes[2].set(title="-log p of the chosen, nats", xlabel="gradient step", xscale="log", yscale="log")
    axes[1].set_xlim(left=1)
    axes[2].set_xlim(left=1)
    axes[2].legend(frameon=False, fontsize=8)
    axes[3].plot(curves["sigmoid"]["TV to pi_r"], label="DPO")
    axes[3].plot(curves["unweighted"]["TV to pi_r"], label="without the weight")
    axes[3].axhline(1e-3, color="grey", linewidth=0.8, linestyle=":")
    axes[3].set(title=r"total variation to $\pi_r$", xlabel="gradient step", xscale="log", yscale="log")
    axes[3].legend(frameon=False, fontsize=8, loc="center left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def show(rows: dict[str, Any], curves: dict[str, Any]) -> None:
    """The table, and the ablation in numbers."""
    from dpojax.progress import console

    columns = list(rows["pi_r"])
    console.print(f"{'objective':16}" + "".join(f"{name:>19}" for name in columns))
    for name, row in rows.items():
        cells = ("-" if value is None else f"{value:.2e}" if "TV" in column else f"{value:.5f}"
                 for column, value in row.items())  # fmt: skip
        console.print(f"{name:16}" + "".join(f"{cell:>19}" for cell in cells))
    last = len(curves["sigmoid"]["TV to pi_r"]) - 1
    for name, curve in curves.items():
        parts = (f"{what} {values[last // 2]:.4g} then {values[last]:.4g}" for what, values in curve.items())
        console.print(f"{name} after {last // 2} and {last} steps of gradient descent: {'; '.join(parts)}")


def main(config: ClosedFormConfig) -> int:
    check(config)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpojax import theory
    from dpojax.progress import console
    from dpojax.startup import prepare

    prepare()
    output = Path(config.output)
    keep_config("closed_form", config)
    draws = np.random.default_rng(config.seed).normal(size=(2, config.prompts, config.completions))
    reward, ref = jnp.asarray(draws[0], jnp.float32), jax.nn.log_softmax(jnp.asarray(draws[1], jnp.float32), axis=-1)
    preferences = theory.preference_probability(reward)
    rows = measure(config, reward, ref, preferences, train_all(config, ref, preferences))
    curves = descend(config, reward, ref, preferences)
    show(rows, curves)
    plot(reward, ref, rows, curves, output / "closed_form.png")
    plain = {"config": dataclasses.asdict(config), "objectives": rows, "gradient descent": curves}
    (output / "metrics.json").write_text(json.dumps(plain, indent=1))
    console.print(f"figure   {output / 'closed_form.png'}\nmetrics  {output / 'metrics.json'}")
    return 0


def run(config: ClosedFormConfig) -> int:
    """`main`, with bad options said in one sentence and status 2."""
    from dpojax.cli import reporting

    return reporting(lambda: main(resolved(config)))


if __name__ == "__main__":
    from dpojax.cli import reporting

    sys.exit(reporting(lambda: run(command_line("closed_form", ClosedFormConfig, __doc__))))
