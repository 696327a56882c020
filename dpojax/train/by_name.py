"""A model or a tokenizer by name, where the name may also be the directory of a run."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from dpojax.configs import ModelOptions
from dpojax.errors import UserError
from dpojax.models import (
    Model,
    abstract_params,
    as_reward_model,
    check_divides,
    config_from_hf,
    load_tokenizer,
    open_model,
)
from dpojax.models.params import flatten, nest
from dpojax.models.safetensors import read_json
from dpojax.progress import Stage
from dpojax.sharding import single_device_mesh
from dpojax.train.checkpoint import Checkpoints, readable, restore_params
from dpojax.train.rundir import is_run, options_of_run
from dpojax.train.top_layers import join, separate
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_policy(name: str, *, mesh: Mesh | None = None, reward: bool = False) -> Model:
    """A model by name, where the name may also be a run's directory (its latest checkpoint).

    Args:
      name: a Hugging Face directory, a hub id, a ``.gguf`` file or a run.
      mesh: where the parameters are born (default: whole, on JAX's first device).
      reward: whether a reward model is wanted; another model gets a fresh head that scores completions.

    Raises:
      UserError: no such model; the mesh does not divide it; or it is a reward model, which writes no text, and none is
        wanted.
    """
    if is_run(name):
        model = load_run(name, mesh=mesh)[0]
    else:
        files = open_model(name)
        if mesh is not None:
            check_divides(mesh, files.config)
        with Stage(f"Loading {Path(name).name}", 1.0) as stage:
            model = files.load(mesh, stage.reach)
    if model.config.reward and not reward:
        raise UserError(f"{name}: is a reward model, which has no vocabulary; use it with --loss reward_model")
    return as_reward_model(model, mesh) if reward else model


def load_run(path: str | Path, which: str = "latest", *, mesh: Mesh | None = None) -> tuple[Model, int]:
    """The policy of a run, its parameters float32, and its step.

    Args:
      path: the run's ``--output`` directory.
      which: "latest", "best" (by eval_loss) or a step.
      mesh: where the parameters are born (default: whole, on JAX's first device).

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
    check_divides(mesh, config)
    whole = abstract_params(config, mesh)
    top, n = whole, options_of_run(run).get("train_top_layers")
    if n is not None:
        below, top = (placed_as(part, whole) for part in jax.eval_shape(lambda params: separate(params, n), whole))
    saved = checkpoints.directory / str(step) / "params"
    with readable(saved.parent):
        params = restore_params(saved, top)
    if n is not None:
        frozen = _restore_frozen(run.absolute() / "frozen", below)
        shardings = jax.tree.map(lambda x: x.sharding, whole)
        params = jax.jit(join, out_shardings=shardings)(frozen, params)
    return Model(config, params, hf_config), int(step)


def placed_as(part: PyTree, whole: PyTree) -> PyTree:
    """Abstract parameters with the shardings of those of the same path."""
    known = flatten(whole)
    return nest(
        {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=known[path].sharding)
            for path, x in flatten(part).items()
        }
    )


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
