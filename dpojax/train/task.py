"""What a run is: its rows, its objective and what the objective reads, resolved once from the options."""

import dataclasses
from typing import Literal

from dpojax.configs import DPOConfig, TrainOptions
from dpojax.data import COMPLETIONS, RowKind, kind_of
from dpojax.errors import UserError
from dpojax.losses import LOSSES, Objective, Traits, spelled, traits_of
from dpojax.options import flag


@dataclasses.dataclass(frozen=True)
class ReferenceChoice:
    """Where a run's reference log-probabilities come from.

    Attributes:
      form: "none"; "cached", computed once for all rows; "live", a forward pass in every step; or "moving", live, and
        mixed with the policy now and then.
      model: the reference by name; None is the policy as it is before training.
      alpha: share of the policy in a moved reference.
      every: steps between two moves.
    """

    form: Literal["none", "cached", "live", "moving"] = "none"
    model: str | None = None
    alpha: float = 0.6
    every: int = 512


@dataclasses.dataclass(frozen=True)
class Task:
    """A run's rows, objective and reference.

    Attributes:
      kind: the rows that the run reads.
      objective: ``(policy, ref) -> [B]`` losses; SFT is :func:`~dpojax.losses.sft` on rows of one completion.
      traits: what the objective reads.
      beta: strength of the KL penalty, for the terms of the objective that bind none; it scales the logged rewards.
      files: the user's own files that the objective comes from.
      reference: where the reference log-probabilities come from.
    """

    kind: RowKind
    objective: Objective
    traits: Traits
    beta: float
    files: tuple[str, ...] = ()
    reference: ReferenceChoice = ReferenceChoice()


def task_of(config: TrainOptions) -> Task:
    """The task of a command's options; the only place that asks which command it is.

    A user's file that the objective comes from is executed here, once.

    Raises:
      UserError: ``--loss`` spells no objective, or an option does not go together with the objective.
    """
    if not isinstance(config, DPOConfig):
        return Task(COMPLETIONS, LOSSES["sft"], traits_of(LOSSES["sft"]), 1.0)
    try:
        spec = spelled(config.loss, label_smoothing=config.label_smoothing)
    except ValueError as error:
        raise UserError(f"--loss {config.loss}: {error}") from None
    if "label_smoothing" in spec.unused:
        wrapped = f"no term of --loss {config.loss} has it; write with_label_smoothing({config.loss}, 0.1)"
        raise UserError(f"--label-smoothing {config.label_smoothing}: {wrapped}")
    objective, beta = spec.resolved(config.beta)
    traits = traits_of(objective)
    check_objective(config, traits)
    return Task(kind_of(traits), objective, traits, beta, spec.files, reference_choice(config, traits))


def reference_choice(config: DPOConfig, traits: Traits) -> ReferenceChoice:
    """The reference of a DPO run; live where it moves, or where the objective reads more of it than sums."""
    if not traits.reference:
        return ReferenceChoice()
    live = config.reference == "live" or traits.needs_live_reference
    form: Literal["cached", "live", "moving"] = "moving" if config.sync_ref_model else "live" if live else "cached"
    return ReferenceChoice(
        form, config.ref_model, config.ref_model_mixup_alpha or 0.6, config.ref_model_sync_steps or 512
    )


def check_objective(config: DPOConfig, traits: Traits) -> None:
    """Refuse options that the objective has no use for, or cannot be computed with.

    Raises:
      UserError: naming the flag and how to fix it.
    """
    micro = config.gradient_accumulation_steps
    if traits.on == "scores" and config.train_top_layers is not None:
        whole = f"--loss {config.loss} trains whole models; leave it out"
        raise UserError(f"--train-top-layers {config.train_top_layers}: {whole}")
    if traits.batch and micro > 1:
        one_piece = f"--loss {config.loss} compares all pairs of a batch, which is then computed in one piece"
        raise UserError(f"--gradient-accumulation-steps {micro}: {one_piece}; leave it at 1")
    if not traits.reference and config.ref_model is not None:
        raise UserError(f"--ref-model {config.ref_model}: --loss {config.loss} reads no reference; leave it out")
    if not traits.reference and config.reference != "auto":
        raise UserError(f"--reference {config.reference}: --loss {config.loss} reads no reference; leave it out")
    check_moving_reference(config, traits)
    if traits.needs_live_reference and config.reference == "cached":
        sums = f"--loss {config.loss} reads single tokens of the reference, and the cache holds sums"
        raise UserError(f"--reference cached: {sums}; use live or auto")


def check_moving_reference(config: DPOConfig, traits: Traits) -> None:
    """Refuse options that do not go together with a moving reference, or that need one.

    Raises:
      UserError: naming the flag and how to fix it.
    """
    if not config.sync_ref_model:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if (value := getattr(config, name)) is not None:
                raise UserError(f"{flag(name)} {value}: the reference does not move; add --sync-ref-model")
        return
    if not traits.reference:
        raise UserError(f"--sync-ref-model: --loss {config.loss} reads no reference; leave it out")
    if config.reference == "cached":
        raise UserError("--reference cached: the reference moves with --sync-ref-model; use live or auto")
    if config.train_top_layers is not None:
        whole = "--sync-ref-model moves whole models; leave one of them out"
        raise UserError(f"--train-top-layers {config.train_top_layers}: {whole}")
