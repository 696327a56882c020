"""A model or a tokenizer by name, where the name may also be the directory of a run."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from dpojax.configs import ModelOptions
from dpojax.errors import UserError
from dpojax.models import (
    DecoderConfig,
    Model,
    abstract_params,
    as_reward_model,
    config_from_hf,
    load_tokenizer,
    open_model,
)
from dpojax.models.generation import read_generation_config
from dpojax.models.load import reward_config
from dpojax.models.safetensors import read_json
from dpojax.progress import Stage
from dpojax.sharding import single_device_mesh
from dpojax.train.checkpoint import Checkpoints, readable, restore_params
from dpojax.train.rundir import is_run, options_of_run
from dpojax.train.top_layers import join, separate_shapes
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class PolicyFiles:
    """A model or a run, opened: its choices; no tensor has been read."""

    name: str
    config: DecoderConfig
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    load: Callable[[Mesh | None], Model]
    """The model with its parameters born on a mesh (default: whole, on JAX's first device)."""


def open_policy(name: str, *, reward: bool = False) -> PolicyFiles:
    """A model by name, where the name may also be a run's directory (its latest checkpoint).

    Args:
      name: a Hugging Face directory, a hub id, a ``.gguf`` file, or a run.
      reward: a reward model is wanted: others get a head that scores completions.

    Raises:
      UserError: no such model; or it is a reward model, which writes no text, and none is asked for.
    """
    if is_run(name):
        hf_config = read_json(Path(name) / "model" / "config.json")
        config = config_from_hf(hf_config, str(Path(name) / "model" / "config.json"))
        generation = read_generation_config(Path(name) / "model")
        read = lambda mesh: load_run(name, mesh=mesh)[0]  # noqa: E731
    else:
        files = open_model(name)
        config, hf_config, generation = files.config, files.hf_config, files.generation_config

        def read(mesh: Mesh | None) -> Model:
            with Stage(f"Loading {Path(name).name}", 1.0) as stage:
                return files.load(mesh, stage.reach)

    if not reward:
        if config.reward:
            raise UserError(f"{name}: is a reward model, which has no vocabulary; use it with --loss reward_model")
        return PolicyFiles(name, config, hf_config, generation, read)
    config, hf_config = reward_config(config, hf_config)
    return PolicyFiles(name, config, hf_config, {}, lambda mesh: as_reward_model(read(mesh), mesh))


def load_policy(name: str, *, reward: bool = False, mesh: Mesh | None = None) -> Model:
    """:func:`open_policy`, and its parameters on a mesh."""
    return open_policy(name, reward=reward).load(mesh)


def load_run(path: str | Path, which: str = "latest", *, mesh: Mesh | None = None) -> tuple[Model, int]:
    """The policy of a run, its parameters born on a mesh, and its step.

    Args:
      path: the run's ``--output`` directory.
      which: "latest", "best" (by eval_loss) or a step.
      mesh: where the parameters lie (default: whole, on JAX's first device).

    Raises:
      UserError: no such run or checkpoint.
    """
    run = Path(path)
    if not is_run(run):
        raise UserError(f"{run}: no run.json; give the --output directory of a dpo or sft run")
    for _ in range(5):
        # A run that is writing here may remove an older checkpoint while we look.
        with contextlib.suppress(FileNotFoundError):
            return _load_checkpoint(run, which, mesh or single_device_mesh())
    raise UserError(f"{run}: its checkpoints change faster than they can be read; try again")


def _load_checkpoint(run: Path, which: str, mesh: Mesh) -> tuple[Model, int]:
    checkpoints = Checkpoints(run, read_only=True)
    steps = sorted(checkpoints.manager.all_steps())
    if not steps:
        raise UserError(f"{run}: no checkpoint yet; let the run reach its first --save-steps")
    step = {"latest": steps[-1], "best": checkpoints.manager.best_step()}.get(which, which)
    if str(step) not in map(str, steps):
        raise UserError(f"{run}: no checkpoint {which!r}; it has latest, best with eval data, and {steps}")
    hf_config = read_json(run / "model" / "config.json")
    config = config_from_hf(hf_config, str(run / "model" / "config.json"))
    trained, n = abstract_params(config, mesh), options_of_run(run).get("train_top_layers")
    if n is not None:
        frozen, trained = separate_shapes(trained, n)
    saved = checkpoints.directory / str(step) / "params"
    with readable(saved.parent):
        params = restore_params(saved, trained)
    if n is not None:
        params = join(_restore_frozen(run.absolute() / "frozen", frozen), params)
    return Model(config, params, hf_config, read_generation_config(run / "model")), int(step)


def _restore_frozen(directory: Path, shapes: PyTree) -> PyTree:
    again = "the run's own command writes it again"
    if not directory.is_dir():
        raise UserError(f"{directory}: is missing; {again}")
    with readable(directory, f"remove this directory, and {again}"):
        return restore_params(directory, shapes)


def tokenizer_for(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name; that they name a model with weights is checked first, which is quick."""
    if not is_run(options.model):
        open_model(options.model)
    return load_policy_tokenizer(options.tokenizer or options.model)


def load_policy_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model by name, or of a run."""
    return load_tokenizer(str(Path(name) / "model") if is_run(name) else name)
