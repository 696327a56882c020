"""The options of the commands beside a run: measure, score, sample, export, look at data, plan."""

import dataclasses
from typing import Literal

import tyro

from dpojax.configs.training import (
    ChatOptions,
    DataOptions,
    ForwardOptions,
    ModelOptions,
    ObjectiveOptions,
    PassOptions,
    ReadingOptions,
    StepOptions,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions(ModelOptions, DataOptions, ForwardOptions):
    """What `logps` and `eval` share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogpsConfig(ScoringOptions):
    """Compute every row's log-probabilities, once: a cache beside the data keeps them for runs on it."""

    output: str | None = None
    """JSONL file, a line a row in their order: chosen_logps and rejected_logps (nats, summed), chosen_len and
    rejected_len (tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(ScoringOptions):
    """Measure a model on preference pairs: accuracy, reward margin, log-probabilities."""

    ref_model: str | None = None
    """Reference model (default: a run's own reference; without one, log-probabilities alone are compared)."""
    beta: float | None = None
    """Strength of the KL penalty, which scales the rewards (default: a run's own, else 0.1)."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and report them, instead of refusing the file."""
    output: str | None = None
    """JSON file for the figures, beside the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(DataOptions, PassOptions):
    """Give every completion its reward, by a reward model or by a function of your own."""

    model: str | None = None
    """Reward model: a Hugging Face directory or hub id of ...ForSequenceClassification with one label, or the --output
    directory of a run with --loss reward_model."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, as for --model (default: the model's own)."""
    scorer: str | None = None
    """In place of a model, path/to/file.py:name of a function that takes a list of prompts and a list of completions
    and gives a number for each."""
    output: str
    """JSONL file, a line a row in their order: the row with score, scores, or score_chosen and score_rejected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig(ReadingOptions, PassOptions):
    """Compare two files of completions of the same prompts by a judge: a reward, scores that the rows have, or a
    language model behind an OpenAI-compatible endpoint. Win rate of A over B, with its confidence interval."""

    a: tyro.conf.Positional[str]
    """Completions whose win rate is asked: a file of rows with prompt and completion (or completions, or a pair, whose
    chosen side it is)."""
    b: tyro.conf.Positional[str]
    """Completions that they are compared with, of the same prompts, in any order."""
    output: str
    """JSONL file of verdicts, a line an answer: prompt, a, b, verdict (A, B, tie or unparsed). Answers of an endpoint
    are added to it as they come, and only what it lacks is asked."""
    json: str | None = None
    """JSON file for the figures, beside the table."""
    limit: int | None = None
    """Comparisons to judge, the first ones (default: all)."""
    agreement: tuple[str, ...] = ()
    """Files of verdicts about the same comparisons, of other judges or of people, whose agreement is measured."""
    scored: bool = False
    """Compare the scores that the rows have, as `dpojax score` writes them."""
    scorer: str | None = None
    """Compare by path/to/file.py:name, as for `dpojax score`."""
    model: str | None = None
    """Compare by a reward model, as for `dpojax score`."""
    tokenizer: str | None = None
    """Where a reward model's tokenizer comes from (default: the model's own)."""
    batch_size: int = 8
    """Rows that a reward model reads at once, over all devices."""
    max_shapes: int = 8
    """Shapes that its batches are packed into at most."""
    endpoint: str | None = None
    """Compare by a language model: URL of a server that has /v1/chat/completions, as in http://localhost:8000/v1."""
    judge_model: str | None = None
    """The model's name at the endpoint."""
    task: Literal["summary", "summary-concise", "dialogue"] = "dialogue"
    """What the model is asked: which summary is better, which is better and more concise, or which reply helps more."""
    template: str | None = None
    """File with a question of your own in place of a task's, with {prompt}, {first} and {second} in it; it asks for a
    last line "Answer: 1", "Answer: 2" or "Answer: tie"."""
    both_orders: bool = False
    """Ask about every comparison twice, in both orders; two different verdicts are a tie."""
    seed: int = 0
    """Seed of the order in which a comparison's completions are shown."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the endpoint needs one; the key is neither shown nor stored."""
    request_options: str = "{}"
    """Further fields of every request, as a JSON object; null takes one of ours out, as in '{"max_tokens": null,
    "max_completion_tokens": 2000}'."""
    max_answer_tokens: int = 256
    """Tokens of an answer, at most (max_tokens)."""
    concurrency: int = 8
    """Requests at one time."""
    retries: int = 5
    """How often a request is tried again after 429, an error of the server or a timeout; waits double from 1 s, or are
    what Retry-After says."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    price_per_million_input: float | None = None
    """Price of a million tokens of questions, for the cost that is shown first."""
    price_per_million_output: float | None = None
    """Price of a million tokens of answers."""
    dry_run: bool = False
    """Show what would be asked and what that would cost, with one request, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelOptions, ChatOptions):
    """Draw completions."""

    prompt: tuple[str, ...]
    """Prompts, each in quotes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, log-probabilities and losses stay float32."""
    chat: bool = False
    """Put each prompt through the model's chat template as a user's message."""
    max_new_tokens: int = 64
    """Tokens drawn at most."""
    num_samples: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """Softmax temperature; 0 takes the most probable token each time."""
    top_k: int = 0
    """How many of the most probable tokens are sampled from (0: all)."""
    top_p: float = 1.0
    """Probability mass of the nucleus sampled from."""
    min_p: float = 0.0
    """Least probability of a token that is sampled, as a share of the most probable one's."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the completion so far are less probable, as in CTRL (arXiv 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, each in quotes (in bash, $'\\n' is a line break); what is printed ends before."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's EOS; they are not printed."""
    batch_size: int = 16
    """Completions drawn side by side."""
    seed: int = 0
    """Seed of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's policy as a Hugging Face directory: safetensors, config, tokenizer and model card; an adapter
    merged."""

    run: str
    """The --output directory of a run."""
    output: str
    """Directory to write."""
    checkpoint: str = "latest"
    """Which checkpoint: latest, best, or a step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the written weights."""
    max_shard_size: str = "5GB"
    """Weights are split into files of at most this size, as in 500MB (powers of ten) or 2GiB (of two); a larger tensor
    has a file of its own."""
    adapter: bool = False
    """Write a LoRA run's adapter alone, in float32, as a directory that peft loads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions(ReadingOptions):
    """What `check-data` and `show-data` share."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, directories, patterns, or names of sets (hub:, tfds:)."""
    kind: Literal["pairs", "completions", "labels"] | None = None
    """What the rows are for: `dpo` (pairs, or several completions with scores), `sft` (completions), or `dpo` with an
    unpaired objective such as kto (completions with labels) (default: what --loss reads, or pairs)."""
    loss: str | None = None
    """An objective, spelled as for `dpo`: its rows are read as a run would, margins and weights included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckDataConfig(InspectOptions):
    """Read data files whole and say what would be kept, truncated and dropped, and why; exit status 1 if anything is
    wrong."""

    model: str | None = None
    """Tokenize as this model would, to find rows that are too long (default: check the fields alone)."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from --model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowDataConfig(ModelOptions, InspectOptions):
    """A look before a run: some rows in tokens, as the model would see them, and figures of all rows: lengths, what is
    cut, equal rows and prompts, bad rows."""

    rows: int | None = None
    """Rows to show, evenly spread (default: 3)."""
    row: tuple[int, ...] = ()
    """Rows to show whole, by their numbers in their file (of several files, in each), in place of --rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTfdsConfig:
    """Write rows as a prepared TFDS data set, in their order; --data tfds:NAME,data_dir=OUTPUT reads it, and TFDS
    itself in any program."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, directories, patterns, or names of sets (hub:, tfds:); they are read twice."""
    output: str
    """TFDS's data_dir; the set is in OUTPUT/NAME/VERSION."""
    name: str
    """Name of the set, in lower case, as in my_pairs."""
    version: str = "1.0.0"
    """Version of the set, three numbers."""
    split: str = "train"
    """Split that the rows are."""
    rows_per_shard: int = 100_000
    """Rows of a file, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """List the objectives: name, equation, paper, needs. Or, with names, plot loss and slope against the log-ratio
    margin of a pair."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Objectives to plot, spelled as for --loss: sigmoid, "ipo(beta=0.3)", sigmoid+0.2*sft, path/to/file.py:name."""
    output: str = "losses.png"
    """PNG file for the plot."""
    beta: float | None = None
    """Strength of the KL penalty, for objectives that have it and do not bind it (default: their own)."""
    span: float | None = None
    """Largest margin plotted, nats (default: 4 over the smallest beta)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a report of runs and experiments: one HTML page that needs nothing beside itself, and Markdown."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Output directories of `dpojax dpo` and `sft` and of experiments; one that holds several stands for all of
    them."""
    output: str = "report.html"
    """HTML file; the Markdown is beside it, with the ending .md."""
    title: str | None = None
    """Heading (default: the names of the runs and experiments)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(StepOptions, ObjectiveOptions):
    """Compile the real train step for accelerators that are not here, and say whether it fits, how long a step takes
    and what bounds it; exit status 0 if it fits, 1 if not. `dpojax dpo ... --plan` plans any other run."""

    model: str
    """A preset (llama3-8b, qwen3-30b-a3b, pythia-2.8b and so on), a config.json, or a model as for `dpojax dpo`; no
    weights are read."""
    topology: str
    """What it runs on: TPU chips along each axis (v5e:16x16, v5p:4x4x4), for which the step is compiled by libtpu, or
    GPUs, nodes x GPUs of a node (h100:8x8), for which the figures are an analysis."""
    batch_size: int = 64
    """Pairs per step, over all devices (the paper: 64)."""
    max_length: int = 1024
    """Tokens of a prompt and one completion; all rows are taken to be as long, unless --lengths says how long."""
    prompt_length: int | None = None
    """Tokens of --max-length that are the prompt's (default: half of them)."""
    lengths: str | None = None
    """JSONL file with the lengths of the rows of a data set, a line a row, as in {"prompt": 310, "completions": [180,
    95]}: batches are packed from them."""
    rows: int | None = None
    """Rows of the data set, for the hours of an epoch (default: those of --lengths)."""
    search: int = 0
    """Compile as many of the most promising meshes, rematerialisations and micro-batches, and plan the best of them
    that fits (0: plan the options as they are)."""
    top: int = 10
    """Source lines shown, by the time that they cost."""
    json: str | None = None
    """JSON file for all figures."""
