"""Everything a run needs before its first step, made from its options."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from dpojax.configs import DataOptions, DPOConfig, TrainOptions
from dpojax.data import (
    COMPLETIONS,
    Batches,
    Encoder,
    Example,
    RowKind,
    fingerprint,
    kind_of,
    load_examples,
    with_mismatched,
)
from dpojax.errors import UserError
from dpojax.losses import Objective, Traits, traits_of
from dpojax.models import DecoderConfig, Model, make_apply, make_attention
from dpojax.progress import Stage, console
from dpojax.sharding import batch_shards, constrainer, make_mesh
from dpojax.train.checkpoint import tokenizer_for
from dpojax.train.freeze import top_config
from dpojax.train.objectives import LossFn, imitation_loss, preference_loss
from dpojax.train.options import make_objective
from dpojax.train.reference import LogpsStep, RefStep, make_logps_step, make_ref_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenized data and how it is batched."""

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
        return fingerprint(self.examples, annotations=True).hex()


def read_examples(files: tuple[str, ...], encoder: Encoder, kind: RowKind, config: DataOptions) -> list[Example]:
    """Examples of the files, what became of their rows said on the console."""
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


def data_kind(config: TrainOptions) -> tuple[RowKind, Traits]:
    """The rows that a run reads, and its objective's traits."""
    if not isinstance(config, DPOConfig):
        return COMPLETIONS, Traits(reference=False)
    traits = traits_of(make_objective(config).objective)
    return kind_of(traits), traits


def load_data(config: TrainOptions) -> Data:
    """Read, tokenize and batch training and held-out data, and say what became of them."""
    kind, traits = data_kind(config)
    tokenizer = tokenizer_for(config)
    encoder = Encoder(tokenizer)

    def read(files: tuple[str, ...]) -> list[Example]:
        examples = read_examples(files, encoder, kind, config)
        return with_mismatched(examples, config.max_length) if "mismatched" in traits.reads else examples

    examples = read(config.data)
    epochs = config.epochs
    if config.steps is not None:
        epochs = -(-config.steps * config.batch_size // len(examples))
    micro = config.gradient_accumulation_steps
    sequences = batch_shards(make_mesh(config.mesh, rows=config.batch_size // micro)) * micro
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


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions a run consists of, and the mesh they run on."""

    mesh: Mesh
    loss_fn: LossFn
    objective: Objective | None
    """None for imitation."""
    beta: float
    """Scales the rewards that are logged."""
    logps_step: LogpsStep
    """Of a whole model; the reference's."""
    policy_logps: LogpsStep
    """Of the policy: with --freeze, of its top alone, on batches that carry hidden states."""
    ref_step: RefStep
    """What the objective reads of a live reference."""

    @property
    def traits(self) -> Traits:
        return Traits(reference=False) if self.objective is None else traits_of(self.objective)


def check_fit(model: Model, examples: Sequence[Example], name: str) -> None:
    """Refuse tokens that the model has no embedding for (JAX would read its last one, without a word).

    Args:
      model: the model.
      examples: all that it will be given.
      name: where their tokens come from, for the error.
    """
    top = max(int(max(e.prompt.max(), *(c.max() for c in e.completions))) for e in examples)
    size, positions = model.config.vocab_size, model.config.max_positions
    if top >= size:
        raise UserError(f"{name}: the tokenizer gives id {top}, the model has {size} embeddings; see --tokenizer")
    longest = max(len(e.prompt) + max(map(len, e.completions)) for e in examples)
    if longest > positions:
        console.print(f"  rows of up to {longest} tokens exceed the {positions} that the model was made for")


def make_program(config: TrainOptions, model: Model) -> Program:
    """Mesh, model, objective and forward pass, put together as the options say."""
    rows = config.batch_size // config.gradient_accumulation_steps
    mesh = make_mesh(config.mesh, model.config, rows)
    place = constrainer(mesh)
    chunk = config.logprob_chunk_tokens
    attention = make_attention(config.attention, mesh, config.dtype)
    policy = model.config if config.freeze is None else top_config(model.config, config.freeze)
    apply_fn = make_apply(policy, dtype=config.dtype, remat=config.remat, constrain=place, attention=attention)
    micro = config.gradient_accumulation_steps

    def logps_of(shape: DecoderConfig) -> LogpsStep:
        forward = make_apply(shape, dtype=config.dtype, constrain=place, attention=attention)
        return make_logps_step(forward, mesh, shape, chunk_tokens=chunk, micro_batches=micro)

    logps_step = logps_of(model.config)
    policy_logps = logps_step if config.freeze is None else logps_of(policy)
    objective, beta, loss_fn = None, 1.0, imitation_loss(apply_fn, chunk_tokens=chunk)
    if isinstance(config, DPOConfig):
        made = make_objective(config)
        objective, beta = made.objective, made.beta
        loss_fn = preference_loss(apply_fn, objective, beta=beta, chunk_tokens=chunk)
    traits = Traits() if objective is None else traits_of(objective)
    whole = make_apply(model.config, dtype=config.dtype, constrain=place, attention=attention)
    ref_step = make_ref_step(whole, mesh, model.config, traits, chunk_tokens=chunk, micro_batches=micro)
    return Program(mesh, loss_fn, objective, beta, logps_step, policy_logps, ref_step)
