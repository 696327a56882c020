"""The tokenised data of a run, and its batches."""

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from dpojax import processes
from dpojax.configs import ChatOptions, DataOptions, TrainOptions
from dpojax.data import Batches, Encoder, EncodingOptions, Examples, RowKind, load_examples, parse_filter
from dpojax.data import with_mismatched as mismatched
from dpojax.data.sources import parse_mixture
from dpojax.errors import UserError
from dpojax.models import DecoderConfig
from dpojax.progress import Stage, console
from dpojax.sharding import batch_shards, held_sequences
from dpojax.train.by_name import tokenizer_for
from dpojax.train.rundir import options_of_run
from dpojax.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 20  # dropped rows that are named on the console; check-data names all


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's tokenizer and batches.

    Attributes:
      tokenizer: the model's, or the one that the options name.
      batches: of all epochs, in the order of the steps.
      eval_batches: the held-out data, once.
      total_steps: of the run.
      beside: a file beside which caches of the training data are kept, and the same of the held-out data.
      today: what a chat template that writes the date took for it; None where it writes none.
    """

    tokenizer: "PreTrainedTokenizerBase"
    batches: Batches
    eval_batches: Batches | None
    total_steps: int
    beside: tuple[str | None, str | None] = (None, None)
    today: str | None = None

    @property
    def examples(self) -> list[Examples]:
        """The training examples, and those that are held out."""
        return [self.batches.examples, *([self.eval_batches.examples] if self.eval_batches else [])]

    @property
    def content_hash(self) -> str:
        """A hash of all tokens and annotations, in their order."""
        return hashlib.blake2b(" ".join(e.content_hash for e in self.examples).encode(), digest_size=16).hexdigest()


def cores() -> int:
    """Processes that tokenise: one for every core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoding_of(config: ChatOptions, today: str | None = None) -> EncodingOptions:
    """How a command's options turn dialogues into tokens; ``today`` is the date where they give none."""
    date = config.chat_date or today or str(datetime.date.today())
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(EncodingOptions) if hasattr(config, f.name)}
    return EncodingOptions(**{**named, "chat_date": date})


def read_examples(
    files: tuple[str, ...], encoder: Encoder, kind: RowKind, config: DataOptions, weights: Sequence[float] = ()
) -> tuple[Examples, str | None]:
    """Examples of the files, and a file beside which caches of them are kept; what became of the rows is printed."""
    with Stage(f"Tokenizing {', '.join(Path(f).name for f in files)}", 1.0) as stage:
        examples, report = load_examples(
            files,
            encoder,
            kind=kind,
            max_length=config.max_length,
            min_prompt_length=config.min_prompt_length,
            skip_bad_rows=getattr(config, "skip_bad_rows", None),
            format=config.format,
            filters=[parse_filter(text) for text in config.filter],
            weights=weights,
            workers=cores(),
            progress=stage.reach,
        )
    for line in [report.sentence(), *report.remarks, *[f"dropped {bad}" for bad in report.dropped[:SHOWN]]]:
        console.print(f"  {line}")
    if len(report.dropped) > SHOWN:
        console.print(f"  and {len(report.dropped) - SHOWN} more, which check-data names")
    return examples, report.beside


def load_data(config: TrainOptions, task: Task, mesh: Mesh) -> Data:
    """The run's training and held-out data, read, tokenised and batched; figures of them are printed.

    Raises:
      UserError: no tokenizer, a file that cannot be read, a row that cannot be used, or no row is left.
    """
    tokenizer = tokenizer_for(config)
    # A run that is continued goes on with the date that it began with.
    today = options_of_run(config.output).get("today") or processes.from_first(str(datetime.date.today()))
    encoder = Encoder(tokenizer, encoding_of(config, today))
    examples, held_out, beside = training_and_held_out(config, task, encoder)
    if "mismatched" in task.traits.reads:
        examples = mismatched(examples, config.max_length)
        held_out = held_out and mismatched(held_out, config.max_length)
    epochs = config.epochs
    if config.steps is not None:
        epochs = -(-config.steps * config.batch_size // len(examples))
    sequences = batch_shards(mesh) * config.gradient_accumulation_steps
    over_mesh: dict[str, Any] = {"sequences": sequences, "held": held_sequences(mesh, sequences)}
    over_mesh["max_shapes"] = config.max_shapes
    batches = Batches(examples, config.batch_size, seed=config.seed, epochs=epochs, **over_mesh)
    console.print(f"  {batches.sentence()}")
    total_steps = len(batches) if config.steps is None else config.steps
    left_over = total_steps * config.batch_size - epochs * len(examples)
    if config.steps is None and left_over > 0:
        console.print(f"  the last batch is {left_over} short of {config.batch_size}; it weighs what it holds")
    if config.warmup_steps >= total_steps:
        console.print(f"  the warmup of {config.warmup_steps} steps is longer than the run of {total_steps}")
    eval_batches = None if held_out is None else Batches(held_out, config.batch_size, **over_mesh)
    today = encoder.options.chat_date if encoder.template.dated else None
    return Data(tokenizer, batches, eval_batches, total_steps, beside, today)


def training_and_held_out(
    config: TrainOptions, task: Task, encoder: Encoder
) -> tuple[Examples, Examples | None, tuple[str | None, str | None]]:
    """The examples of ``--data``, those that are held out, and the files beside which caches of both are kept.

    Raises:
      UserError: a row cannot be used, or one of the sides is empty.
    """
    mixture = parse_mixture(config.data)
    weights = [weight for _, weight in mixture if weight is not None]
    examples, beside = read_examples(tuple([name for name, _ in mixture]), encoder, task.kind, config, weights)
    if config.eval_data:
        held_out, theirs = read_examples(config.eval_data, encoder, task.kind, config)
        return examples, held_out, (beside, theirs)
    if not config.eval_share:
        return examples, None, (beside, None)
    is_held_out = examples.prompts < np.uint64(int(config.eval_share * 2**64))
    held_out = examples.select(np.flatnonzero(is_held_out))
    held_out.part = None  # every row of it is evaluated once, whatever its part of a mixture
    examples = examples.select(np.flatnonzero(~is_held_out))
    if not len(held_out) or not len(examples):
        which = "no row is held out" if len(examples) else "no row is left to train on"
        raise UserError(f"--eval-share {config.eval_share}: {which}; the prompts are too few for this share")
    console.print(f"  {len(held_out)} rows are held out, {len(examples)} are trained on; no prompt is among both")
    return examples, held_out, (beside, beside)


def check_fit(model: DecoderConfig, examples: Sequence[Examples], name: str) -> None:
    """Refuse tokens and positions that the model has no embedding for; JAX would read its last one without an error.

    Args:
      model: the decoder's choices.
      examples: all that it will be given.
      name: where their tokens come from, for the error.

    Raises:
      UserError: naming the largest token or the longest row, and what the model has.
    """
    top, size, positions = max(some.top for some in examples), model.vocab_size, model.max_positions
    if top >= size:
        raise UserError(f"{name}: the tokenizer gives id {top}, the model has {size} embeddings; see --tokenizer")
    longest = max(int((some.prompt_len + some.completion_len.max(axis=1)).max()) for some in examples)
    if model.longest is not None and longest > model.longest:
        raise UserError(
            f"{name}: a row has {longest} tokens, the model has positions for {model.longest}; lower --max-length"
        )
    if longest > positions:
        console.print(f"  rows of up to {longest} tokens exceed the {positions} that the model was made for")
