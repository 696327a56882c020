"""The options of runs, and what other commands share with them: where models, rows and meshes come from."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int | Literal["auto"] = "auto"
    """Copies of the model that split the batch (-1: all devices that the other axes leave; auto: the same, or, where a
    copy would not fit into a device's memory, one, which --mesh.fsdp shares out)."""
    fsdp: int = 1
    """Devices that split the batch and share out parameters and optimizer state between them."""
    tensor: int = 1
    """Devices that split heads, MLP and vocabulary within a layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How hidden states are computed."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, log-probabilities and losses stay float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel: XLA's own, cuDNN's for GPUs (bfloat16), Splash for TPUs, or what fits the devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions(PassOptions):
    """How a forward pass computes."""

    logprob_chunk_tokens: int = 512
    """Completion tokens whose logits exist at one time on a device; less takes less memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions(ForwardOptions):
    """How a train step computes: a forward pass, and what its backward pass keeps."""

    remat: Literal["none", "mlp", "dots", "qkv", "attention", "block"] = "none"
    """What the backward pass recomputes, from nothing to whole layers: keeps all; weight products and attention's
    results (mlp); weight products; attention's inputs and results (qkv); its results; one activation a layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and which tokenizer."""

    model: str
    """Hugging Face directory, hub id (owner/name), .gguf file, or the --output directory of a run."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, as for --model (default: the model's own)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How chats, and special tokens in rows, become tokens."""

    chat_template_kwargs: str = "{}"
    """Arguments of the chat template, as a JSON object, as in '{"enable_thinking": false}'; a row's own come first."""
    chat_date: str | None = None
    """What a chat template that writes the date takes for today, as in 2026-11-25 (default: the day on which the run
    began)."""
    chat_special_tokens: Literal["template", "tokenizer"] = "template"
    """BOS and EOS of chats: as the chat template writes them, or with those that the tokenizer puts around any text."""
    allow_special_tokens: bool = False
    """Take what spells a special token in a row's text for that token; otherwise it is text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOptions(ChatOptions):
    """How records become rows, and rows tokens."""

    format: str = "auto"
    """Format that the records were published in: a name of docs/formats.md, rows (the fields prompt, chosen, rejected
    and so on), path/to/file.py:name for one of your own, or auto, found by the columns."""
    filter: tuple[str, ...] = ()
    """Records to use, by comparisons of a column, each in quotes: "score_chosen>=7", "language==en"."""
    as_chat: bool = False
    """Take plain text for a chat: the prompt is a user's message, a completion the assistant's."""
    max_length: int = 1024
    """Tokens of prompt + completion; longer rows lose the prompt's start first, then the completions' ends."""
    min_prompt_length: int = 64
    """Tokens of the prompt that are kept before completions are cut, at most half of --max-length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """Which rows, and how they become batches."""

    data: tuple[str, ...]
    """Files, directories, patterns, or names of sets (hub:, tfds:) of rows with the fields prompt, chosen and rejected
    (text or chat messages), or in a published format; for training also with weights, as in a.jsonl=0.7
    b.parquet=0.3."""
    batch_size: int = 8
    """Pairs per step, over all devices (the paper: 64)."""
    max_shapes: int = 8
    """Shapes that batches are packed into at most; fewer are compiled where they keep padding below 8 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(ComputeOptions):
    """What a train step computes and keeps, which a plan of it needs too."""

    optim: Literal["rmsprop", "adamw"] = "rmsprop"
    """Optimizer; RMSprop (decay 0.99, as in torch) is the paper's."""
    optim_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments; bfloat16 halves their memory and is rounded stochastically."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that a batch is computed in, one after another; results agree, memory falls."""
    train_top_layers: int | None = None
    """Train only the top N layers and the final norm; the layers below are computed once for every row."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank beside the frozen model (default: train the model itself; or the adapter that
    --model or --adapter names)."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, by the names that PEFT has for them, as in q_proj v_proj; all-linear is every one of
    the layers."""
    quantize_base: Literal["none", "int8", "nf4"] = "none"
    """How the layers' frozen weights are kept beside an adapter: in 8 bits, or in the 4 of QLoRA; the reference reads
    the same."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are arranged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions, DataOptions, StepOptions):
    """What `dpo` and `sft` share."""

    plan: str | None = None
    """Run nothing: plan this run for accelerators that need not be here, as `dpojax plan` does, by their topology
    (v5e:16x16, h100:8x8)."""
    output: str
    """Directory of the run: checkpoints, metrics, config. The same command on it continues the run."""
    run_name: str | None = None
    """Name of the run, for trackers and the model card (default: the last part of --output)."""
    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ("tensorboard",)
    """What gets the figures of every step, beside metrics.jsonl: event files below --output; Weights & Biases, by its
    own variables (WANDB_PROJECT, default dpojax; WANDB_MODE); or nothing."""
    eval_data: tuple[str, ...] = ()
    """Held-out files, evaluated before the first step, every --eval-steps and after the last."""
    eval_share: float = 0.0
    """Share of the prompts of --data that is held out instead, chosen by a hash: no prompt is on both sides."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and report them, instead of refusing the file."""
    epochs: int = 1
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps; overrides --epochs."""
    learning_rate: float = 1e-6
    """Peak learning rate (the paper: 1e-6)."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Schedule after the linear warmup; linear and cosine end at 0."""
    warmup_steps: int = 150
    """Steps of linear warmup (the paper: 150)."""
    weight_decay: float = 0.0
    """Decoupled weight decay per unit of learning rate; AdamW only."""
    max_grad_norm: float = 10.0
    """Gradients are scaled down to this global norm (the original repository: 10)."""
    lora_alpha: float | None = None
    """The adapter's products are multiplied with alpha / rank (default: twice the rank, as TRL's 32 for 16)."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that training sets to zero."""
    use_rslora: bool = False
    """Multiply with alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    lora_init: Literal["b-zero", "a-zero"] = "b-zero"
    """The factor that starts at zero; the other is random. From B, the first steps move slower; from A, they cannot
    hang at ln 2."""
    adapter: str | None = None
    """PEFT adapter on --model to start from; the reference is both together. (--model may also be such a directory,
    which names its base.)"""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, which is logged as aux_loss (0: logged alone)."""
    seed: int = 0
    """Seed of the data order, and of a new adapter."""
    logging_steps: int = 1
    """Steps between two lines of metrics."""
    eval_steps: int = 100
    """Steps between two evaluations."""
    save_steps: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    save_total_limit: int = 2
    """Latest checkpoints kept, beside the best by eval_loss of those evaluated and saved at the same step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Which objective, and where its reference comes from."""

    loss: str = "sigmoid"
    """Objective: a name that `dpojax losses` lists, as in sigmoid+0.2*sft or "ipo(beta=0.3)", or path/to/file.py:name
    for one of your own."""
    reference: Literal["auto", "cached", "live"] = "auto"
    """Reference log-probabilities: computed once for all runs on these rows, or again in every step; auto is cached
    unless the objective reads single tokens of the reference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainOptions, ObjectiveOptions):
    """Align a model to preference pairs. `--config runs/x/run.json` repeats a run: all options are its own, but
    for those given beside it."""

    beta: float | None = None
    """Strength of the KL penalty (default: the objective's own, mostly 0.1; the paper: 0.1, for summarization 0.5)."""
    label_smoothing: float | None = None
    """Probability that a label is flipped, from 0 to below 0.5, for objectives that have it (default: their own)."""
    ref_model: str | None = None
    """Reference model, as for --model (default: --model itself as it is before training)."""
    sync_ref_model: bool = False
    """Move the reference towards the policy now and then, as in TR-DPO (arXiv 2404.09656); it runs in every step."""
    ref_model_mixup_alpha: float | None = None
    """Share of the policy in the moved reference, the rest is the old one (default: 0.6; 1 replaces it)."""
    ref_model_sync_steps: int | None = None
    """Steps between two moves of the reference (default: 512)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainOptions):
    """Fine-tune a model on completions: fields prompt and completion, or the chosen side of pairs. `--config
    runs/x/run.json` repeats a run: all options are its own, but for those given beside it."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
