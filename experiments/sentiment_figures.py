"""The curves and the table of experiments/sentiment.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", "DPO loss", 0.6931),
    ("rewards/accuracies", "reward accuracy", 0.5),
    ("rewards/margins", "reward margin", 0.0),
)
WINDOW = 5  # steps; a step has 8 pairs, so single steps are noisy


def plot(runs: Sequence[Path], results: Sequence[dict[str, Any]], path: Path) -> None:
    """Training curves of every run (thin: each step; thick: mean of the last five), and sentiment before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for axis, (name, title, start) in zip(axes, PANELS, strict=False):
        for i, run in enumerate(runs):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            values = np.array([line[name] for line in lines])
            means = [values[max(0, k - WINDOW + 1) : k + 1].mean() for k in range(len(values))]
            axis.plot(range(1, len(values) + 1), values, color=f"C{i}", alpha=0.25)
            axis.plot(range(1, len(values) + 1), means, color=f"C{i}", linewidth=2, label=run.name)
        axis.axhline(start, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="step")
    axes[0].legend(frameon=False)
    for i, result in enumerate(results):
        figures = [result["figures"][when]["mean sentiment"] for when in ("before", "after")]
        means, errors = [f["mean"] for f in figures], [f["error"] for f in figures]
        axes[3].errorbar([0, 1], means, yerr=errors, color=f"C{i}", marker="o", capsize=4)
    axes[3].set(title="sentiment of held-out samples", xlim=(-0.4, 1.4))
    axes[3].set_xticks([0, 1], ["before", "after"])
    figure.savefig(path, dpi=100)


def show(results: Sequence[dict[str, Any]], output: Path, exported: Path) -> None:
    """The table, three prompts, and where everything lies."""
    from rich.table import Table

    from dpojax.evaluate import Estimate
    from dpojax.progress import console

    for result in results:
        table = Table(title=f"Held-out openings, seed {result['seed']}; ± is the standard error over openings")
        table.add_column("figure")
        before, after = result["figures"]["before"], result["figures"]["after"]
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for name in before:
            table.add_row(name, str(Estimate(**before[name])), str(Estimate(**after[name])))
        console.print(table)
    for prompt, before, after in results[0]["texts"]:
        console.print(prompt, style="bold")
        for label, text in (("before:", before), ("after: ", after)):
            console.print(f"  {label} {text.strip()!r}")
    console.print(f"curves      {output / 'curves.png'}")
    console.print(f"checkpoint  {exported.parent / 'checkpoints'}  (Orbax)")
    console.print(f"model       {exported}  (Hugging Face)")
