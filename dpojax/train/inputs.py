"""The tokenised data of a run, and its batches."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from dpojax.configs import DataOptions, TrainOptions
from dpojax.data import Batches, Encoder, Example, RowKind, fingerprint, load_examples, with_mismatched
from dpojax.errors import UserError
from dpojax.models import DecoderConfig
from dpojax.progress import Stage, console
from dpojax.sharding import batch_shards
from dpojax.train.by_name import tokenizer_for
from dpojax.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's tokenizer and batches.

    Attributes:
      tokenizer: the model's, or the one that the options name.
      batches: of all epochs, in the order of the steps.
      eval_batches: the held-out data, once.
      total_steps: of the run.
    """

    tokenizer: "PreTrainedTokenizerBase"
    batches: Batches
    eval_batches: Batches | None
    total_steps: int

    @property
    def examples(self) -> list[Example]:
        """Training and held-out examples."""
        return [*self.batches.examples, *(self.eval_batches.examples if self.eval_batches else [])]

    @property
    def content_hash(self) -> str:
        """A fingerprint of all tokens and annotations, in their order."""
        return fingerprint(self.examples, annotations=True).hex()


def read_examples(files: tuple[str, ...], encoder: Encoder, kind: RowKind, config: DataOptions) -> list[Example]:
    """Examples of the files; how many rows were kept, truncated and dropped is printed."""
    with Stage(f"Tokenizing {', '.join(Path(f).name for f in files)}", 1.0) as stage:
        examples, report = load_examples(
            files,
            encoder,
            kind=kind,
            max_length=config.max_length,
            skip_bad_rows=getattr(config, "skip_bad_rows", None),
            progress=stage.reach,
        )
    console.print(f"  {report.sentence()}")
    for bad in report.dropped:
        console.print(f"  dropped {bad}")
    return examples


def load_data(config: TrainOptions, task: Task, mesh: Mesh) -> Data:
    """The run's training and held-out data, read, tokenised and batched; figures of them are printed.

    Raises:
      UserError: no tokenizer, a file that cannot be read, a row that cannot be used, or no row is left.
    """
    tokenizer = tokenizer_for(config)
    encoder = Encoder(tokenizer)

    def read(files: tuple[str, ...]) -> list[Example]:
        examples = read_examples(files, encoder, task.kind, config)
        return with_mismatched(examples, config.max_length) if "mismatched" in task.traits.reads else examples

    examples = read(config.data)
    epochs = config.epochs
    if config.steps is not None:
        epochs = -(-config.steps * config.batch_size // len(examples))
    micro = config.gradient_accumulation_steps
    sequences = batch_shards(mesh) * micro
    shape_options = {"max_shapes": config.max_shapes, "sequences": sequences}
    batches = Batches(examples, config.batch_size, seed=config.seed, epochs=epochs, **shape_options)
    console.print(f"  {batches.sentence()}")
    total_steps = len(batches) if config.steps is None else config.steps
    left_over = total_steps * config.batch_size - epochs * len(examples)
    if config.steps is None and left_over > 0:
        console.print(f"  the last batch is {left_over} short of {config.batch_size}; it weighs what it holds")
    if config.warmup_steps >= total_steps:
        console.print(f"  the warmup of {config.warmup_steps} steps is longer than the run of {total_steps}")
    eval_batches = None
    if config.eval_data:
        eval_batches = Batches(read(config.eval_data), config.batch_size, **shape_options)
    return Data(tokenizer, batches, eval_batches, total_steps)


def check_fit(model: DecoderConfig, examples: Sequence[Example], name: str) -> None:
    """Refuse tokens that the model has no embedding for; JAX would read its last one without an error.

    Args:
      model: the decoder's choices.
      examples: all that it will be given.
      name: where their tokens come from, for the error.

    Raises:
      UserError: naming the largest token and the number of embeddings.
    """
    top = max(int(max(e.prompt.max(), *(c.max() for c in e.completions))) for e in examples)
    size, positions = model.vocab_size, model.max_positions
    if top >= size:
        raise UserError(f"{name}: the tokenizer gives id {top}, the model has {size} embeddings; see --tokenizer")
    longest = max(len(e.prompt) + max(map(len, e.completions)) for e in examples)
    if longest > positions:
        console.print(f"  rows of up to {longest} tokens exceed the {positions} that the model was made for")
