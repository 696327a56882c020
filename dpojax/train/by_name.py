"""A model or a tokenizer by name, where the name may also be the directory of a run."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from dpojax.configs import ModelOptions
from dpojax.errors import UserError
from dpojax.models import Model, as_reward_model, check_model, load_model, load_tokenizer
from dpojax.models.config import config_from_hf
from dpojax.models.decoder import split
from dpojax.models.safetensors import read_json
from dpojax.progress import Stage
from dpojax.train.checkpoint import Checkpoints, readable, restore_params
from dpojax.train.rundir import is_run, options_of_run
from dpojax.train.top_layers import join, separate
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_policy(name: str, *, reward: bool = False) -> Model:
    """A model by name, where the name may also be a run's directory (its latest checkpoint).

    Raises:
      UserError: no such model; or it is a reward model, which writes no text, and none is asked for.
    """
    if is_run(name):
        model = load_run(name)[0]
    else:
        with Stage(f"Loading {Path(name).name}", 1.0) as stage:
            model = load_model(name, stage.reach)
    if model.config.reward and not reward:
        raise UserError(f"{name}: is a reward model, which has no vocabulary; use it with --loss reward_model")
    return as_reward_model(model) if reward else model


def load_run(path: str | Path, which: str = "latest") -> tuple[Model, int]:
    """The policy of a run, as float32 NumPy arrays, and its step.

    Args:
      path: the run's ``--output`` directory.
      which: "latest", "best" (by eval_loss) or a step.

    Raises:
      UserError: no such run or checkpoint.
    """
    run = Path(path)
    if not is_run(run):
        raise UserError(f"{run}: no run.json; give the --output directory of a dpo or sft run")
    for _ in range(5):
        # A run that is writing here may remove an older checkpoint while we look.
        with contextlib.suppress(FileNotFoundError):
            return _load_checkpoint(run, which)
    raise UserError(f"{run}: its checkpoints change faster than they can be read; try again")


def _load_checkpoint(run: Path, which: str) -> tuple[Model, int]:
    checkpoints = Checkpoints(run, read_only=True)
    steps = sorted(checkpoints.manager.all_steps())
    if not steps:
        raise UserError(f"{run}: no checkpoint yet; let the run reach its first --save-steps")
    step = {"latest": steps[-1], "best": checkpoints.manager.best_step()}.get(which, which)
    if str(step) not in map(str, steps):
        raise UserError(f"{run}: no checkpoint {which!r}; it has latest, best with eval data, and {steps}")
    hf_config = read_json(run / "model" / "config.json")
    config = config_from_hf(hf_config, str(run / "model" / "config.json"))
    _, shapes = split(config)
    top, n = shapes, options_of_run(run).get("train_top_layers")
    if n is not None:
        below, top = jax.eval_shape(lambda params: separate(params, n), shapes)
    saved = checkpoints.directory / str(step) / "params"
    with readable(saved.parent):
        params = restore_params(saved, top)
    if n is not None:
        params = join(_restore_frozen(run.absolute() / "frozen", below), params)
    return Model(config, params, hf_config), int(step)


def _restore_frozen(directory: Path, shapes: PyTree) -> PyTree:
    again = "the run's own command writes it again"
    if not directory.is_dir():
        raise UserError(f"{directory}: is missing; {again}")
    with readable(directory, f"remove this directory, and {again}"):
        return restore_params(directory, shapes)


def tokenizer_for(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name; that they name a model with weights is checked first, which is quick."""
    if not is_run(options.model):
        check_model(options.model)
    return load_policy_tokenizer(options.tokenizer or options.model)


def load_policy_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model by name, or of a run."""
    return load_tokenizer(str(Path(name) / "model") if is_run(name) else name)
