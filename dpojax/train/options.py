"""Options that make no sense, each refused in one sentence before anything is read; objectives from their spelling."""

import dataclasses
from math import inf
from typing import Any

from dpojax.configs import DPOConfig
from dpojax.errors import UserError
from dpojax.losses import ObjectiveSpec, Traits, spelled, traits_of

# field -> (what it must be, whether a value is)
RANGES: dict[str, tuple[str, Any]] = {
    "beta": ("above 0 and finite", lambda v: 0 < v < inf),
    "label_smoothing": ("from 0 to below 0.5", lambda v: 0 <= v < 0.5),
    "ref_model_mixup_alpha": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "learning_rate": ("above 0 and finite", lambda v: 0 < v < inf),
    "max_grad_norm": ("above 0", lambda v: v > 0),
    "weight_decay": ("at least 0", lambda v: v >= 0),
    "warmup_steps": ("at least 0", lambda v: v >= 0),
    "max_length": ("at least 2, one token of prompt and one of completion", lambda v: v >= 2),
    "temperature": ("at least 0", lambda v: v >= 0),
    "top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "data": ("at least one file", len),
    "prompt": ("at least one text", len),
    "seed": ("from 0 to 4294967295", lambda v: 0 <= v < 2**32),
} | {
    name: ("at least 1", lambda v: v >= 1)
    for name in (
        *("batch_size", "max_shapes", "logprob_chunk_tokens", "epochs", "steps", "gradient_accumulation_steps"),
        *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_new_tokens", "num_samples"),
        "ref_model_sync_steps",
    )
}


def flag(field: str) -> str:
    """How the command line spells a field."""
    return "--" + field.replace("_", "-")


def check_options(config: Any) -> None:
    """Refuse values outside their range, and options that another option makes dead.

    Raises:
      UserError: naming the flag, its value and what it must be.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in RANGES and value is not None:
            must, holds = RANGES[field.name]
            if not holds(value):
                shown = "" if value == () else f" {value}"
                raise UserError(f"{flag(field.name)}{shown}: must be {must}")
    if getattr(config, "weight_decay", 0) and config.optim != "adamw":
        raise UserError(f"--weight-decay {config.weight_decay}: {config.optim} has none; use --optim adamw")
    if hasattr(config, "gradient_accumulation_steps") and config.batch_size % config.gradient_accumulation_steps:
        n = config.gradient_accumulation_steps
        raise UserError(f"--gradient-accumulation-steps {n}: must divide --batch-size {config.batch_size}")
    if isinstance(config, DPOConfig):
        check_objective(config)


def make_objective(config: DPOConfig) -> ObjectiveSpec:
    """The objective that ``--loss`` spells, with the options that it has.

    Raises:
      UserError: it spells none, or an option is given that none of its terms has.
    """
    try:
        made = spelled(config.loss, beta=config.beta, label_smoothing=config.label_smoothing)
    except ValueError as error:
        raise UserError(f"--loss {config.loss}: {error}") from None
    if "label_smoothing" in made.unused:
        say = f"no term of --loss {config.loss} has it; write with_label_smoothing({config.loss}, 0.1)"
        raise UserError(f"--label-smoothing {config.label_smoothing}: {say}")
    return made


def check_objective(config: DPOConfig) -> None:
    """Refuse what the objective has no use for, or cannot be computed with.

    Raises:
      UserError: naming the flag and the mend.
    """
    traits = traits_of(make_objective(config).objective)
    micro = config.gradient_accumulation_steps
    if traits.on == "scores" and config.freeze is not None:
        raise UserError(f"--freeze {config.freeze}: --loss {config.loss} trains whole models; leave it out")
    if traits.batch and micro > 1:
        say = f"--loss {config.loss} compares all pairs of a batch, which is then computed in one piece"
        raise UserError(f"--gradient-accumulation-steps {micro}: {say}; leave it at 1")
    if not traits.reference and config.ref_model is not None:
        raise UserError(f"--ref-model {config.ref_model}: --loss {config.loss} reads no reference; leave it out")
    if not traits.reference and config.reference != "auto":
        raise UserError(f"--reference {config.reference}: --loss {config.loss} reads no reference; leave it out")
    check_moving_reference(config, traits)
    if traits.needs_live_reference and config.reference == "cached":
        say = f"--loss {config.loss} reads single tokens of the reference, and the cache holds sums"
        raise UserError(f"--reference cached: {say}; use live or auto")


def check_moving_reference(config: DPOConfig, traits: Traits) -> None:
    """Refuse what does not go together with a reference that moves, or needs one."""
    if not config.sync_ref_model:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"{flag(name)} {getattr(config, name)}: the reference does not move; add --sync-ref-model"
                )
        return
    if not traits.reference:
        raise UserError(f"--sync-ref-model: --loss {config.loss} reads no reference; leave it out")
    if config.reference == "cached":
        raise UserError("--reference cached: the reference moves with --sync-ref-model; use live or auto")
    if config.freeze is not None:
        raise UserError(f"--freeze {config.freeze}: --sync-ref-model moves whole models; leave one of them out")
