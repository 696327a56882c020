"""A run's directory: its config, its model's config and tokenizer, and Orbax checkpoints.

run.json          the command's options, the reference's content hash, the model's shape
model/            config.json and tokenizer, for export
frozen/           with --freeze: the parameters that no step changes
metrics.jsonl, tensorboard/
checkpoints/N/    params (those that are trained) | train (step, optimizer state, RNG) | position (of the data),
                  and, with --sync-ref-model, reference
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from dpojax.configs import ModelOptions, TrainOptions
from dpojax.errors import UserError, first_line
from dpojax.models import Model, as_reward_model, check_model, load_model, load_tokenizer
from dpojax.models.config import config_from_hf
from dpojax.models.decoder import split
from dpojax.models.safetensors import read_json
from dpojax.train.freeze import join, separate
from dpojax.train.step import TrainState
from dpojax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_run(path: str | Path) -> bool:
    """Whether a path is the ``--output`` directory of a run."""
    return (Path(path) / "run.json").is_file()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
    return {name: list(value) if isinstance(value, tuple) else value}


def file_hash(path: str) -> str:
    """A fingerprint of a file's bytes."""
    return hashlib.blake2b(Path(path).expanduser().read_bytes(), digest_size=16).hexdigest()


def claim_directory(config: TrainOptions, facts: dict[str, str]) -> None:
    """Take ``--output`` for this run, or find that it holds the same run already.

    Args:
      config: every option; all but ``output`` must agree with what the directory holds.
      facts: content hashes (model, reference, data) that must agree too.

    Raises:
      UserError: the directory holds another run's config, or files that are no run.
    """
    directory = Path(config.output)
    mine = {"command": type(config).__name__, **_flat(dataclasses.asdict(config)), **facts}
    del mine["output"]
    if is_run(directory):
        theirs = read_json(directory / "run.json")
        differing = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        if differing:
            named = ", ".join(f"{n} ({theirs.get(n)!r} there, {mine.get(n)!r} here)" for n in differing)
            raise UserError(f"--output {directory}: holds a run with another {named}; name another directory")
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--output {directory}: exists and is no run of dpojax; name a new or empty directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be made ({error.strerror}); name another directory") from None
    partial = directory / "run.json.partial"
    partial.write_text(json.dumps(mine, indent=2))
    partial.replace(directory / "run.json")


def save_model_files(model: Model, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """What export needs beside the weights; written once, whole or not at all."""
    if directory.exists():
        return
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "config.json").write_text(json.dumps(model.hf_config, indent=2))
    tokenizer.save_pretrained(partial)
    partial.replace(directory)


def goodness(metrics: dict[str, float]) -> float:
    """What the best checkpoint has most of."""
    return -metrics["eval_loss"]


class Checkpoints:
    """Orbax checkpoints of a run: asynchronous, atomic, the latest few and the best by eval_loss kept."""

    def __init__(self, run: Path, keep_latest: int = 1, *, read_only: bool = False):
        # Orbax logs an error's traceback from each of its threads; we raise it once, as a sentence.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.directory = (run / "checkpoints").absolute()
        best = managers.BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=goodness,
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep_latest), best]),
            # A reader must leave alone what the run it reads from is just writing.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int:
        """The last complete checkpoint's step; 0 if there is none."""
        return self.manager.latest_step() or 0

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Errors of writing, said in a sentence; the last complete checkpoint is never touched by them."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            text = str(error)
            full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "File too large" in text
            reason = "the disk is full" if full else first_line(error)
            mend = "free some space" if full else "see to it"
            complete = [int(path.name) for path in self.directory.glob("*") if path.name.isdigit()]
            last = f"from step {max(complete)}" if complete else "from the start"
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({reason}); {mend} and give the same "
                f"command again, which continues {last}"
            ) from error

    def save(
        self, state: TrainState, position: dict[str, Any], eval_loss: float | None, moved: PyTree | None = None
    ) -> None:
        """Start writing; training goes on meanwhile. An error of the previous write is raised here.

        ``moved`` is a reference that the run itself has changed.
        """
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        train = {"step": state.step, "opt_state": state.opt_state, "rng": jax.random.key_data(state.rng)}
        if state.running:  # Orbax saves no empty tree
            train["running"] = state.running
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            position=ocp.args.JsonSave(position),
            **({} if moved is None else {"reference": ocp.args.StandardSave(moved)}),
        )
        with self._disk():
            needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, moved)))
            free = shutil.disk_usage(self.directory).free
            if free < needed:  # a write that cannot end well is not begun
                raise OSError(errno.ENOSPC, f"No space left on device: {needed:,} bytes needed, {free:,} free")
            self.manager.save(int(state.step), args=items, metrics=metrics)

    def save_frozen(self, params: PyTree) -> None:
        """What no step changes; written once a run, whole or not at all."""
        directory = self.directory.with_name("frozen")
        if not directory.exists():
            with self._disk(), ocp.StandardCheckpointer() as writer:
                writer.save(directory, params)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out as the abstract state ``like`` is, and the data position."""
        rng = jax.eval_shape(jax.random.key_data, like.rng)
        rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=like.step.sharding)
        train = {"step": like.step, "opt_state": like.opt_state, "rng": rng}
        if like.running:
            train["running"] = like.running
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            train=ocp.args.StandardRestore(train),
            position=ocp.args.JsonRestore(),
        )
        with readable(self.directory / str(step)):
            items = self.manager.restore(step, args=args)
        train = items.train
        key = jax.random.wrap_key_data(train["rng"])
        state = TrainState(train["step"], items.params, train["opt_state"], key, running=train.get("running", {}))
        return state, items.position

    def restore_moved(self, step: int, like: PyTree) -> PyTree:
        """The reference as the run had changed it by a step, laid out as ``like`` is."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(reference=ocp.args.StandardRestore(shapes))
        with readable(self.directory / str(step)):
            return self.manager.restore(step, args=args).reference

    def finish(self) -> None:
        """Wait until everything is on disk."""
        with self._disk():
            self.manager.wait_until_finished()
        self.manager.close()


@contextlib.contextmanager
def readable(directory: Path, mend: str = "remove this directory, and the one before it is used") -> Iterator[None]:
    """A checkpoint that cannot be read, said in a sentence."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if not directory.exists():
            raise FileNotFoundError(directory) from error
        raise UserError(f"{directory}: damaged checkpoint ({first_line(error)}); {mend}") from error


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
    saved = checkpoints.directory / str(step) / "params"
    freeze = options_of_run(str(run)).get("freeze")
    if freeze is None:
        below, top = None, shapes
    else:
        below, top = jax.eval_shape(lambda params: separate(params, freeze), shapes)
    with readable(saved.parent):
        params = _restore_params(saved, top)
    if below is not None:
        params = join(_restore_frozen(run.absolute() / "frozen", below), params)
    return Model(config, params, hf_config), int(step)


def _restore_frozen(directory: Path, shapes: PyTree) -> PyTree:
    mend = "the run's own command writes it again"
    if not directory.is_dir():
        raise UserError(f"{directory}: is missing; {mend}")
    with readable(directory, f"remove this directory, and {mend}"):
        return _restore_params(directory, shapes)


def _restore_params(directory: Path, shapes: PyTree) -> PyTree:
    to_numpy = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), shapes)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(directory, args=ocp.args.PyTreeRestore(item=shapes, restore_args=to_numpy))


def load_policy(name: str, *, reward: bool = False) -> Model:
    """A model by name, where the name may also be a run's directory (its latest checkpoint).

    Raises:
      UserError: no such model; or it is a reward model, which writes no text, and none is asked for.
    """
    from dpojax.progress import Stage

    if is_run(name):
        model = load_run(name)[0]
    else:
        with Stage(f"Loading {Path(name).name}", 1.0) as stage:
            model = load_model(name, stage.reach)
    if model.config.reward and not reward:
        raise UserError(f"{name}: is a reward model, which has no vocabulary; use it with --loss reward_model")
    return as_reward_model(model) if reward else model


def tokenizer_for(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name; that they name a model with weights is checked first, as that is quick."""
    if not is_run(options.model):
        check_model(options.model)
    return load_policy_tokenizer(options.tokenizer or options.model)


def load_policy_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model by name, or of a run."""
    return load_tokenizer(str(Path(name) / "model") if is_run(name) else name)


def options_of_run(name: str) -> dict[str, Any]:
    """The options of a run, by name; empty where ``name`` is no run."""
    return read_json(Path(name) / "run.json") if is_run(name) else {}
