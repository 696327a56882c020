"""Orbax checkpoints of a run: asynchronous, atomic, the latest few and the best by eval_loss kept."""

import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from dpojax.errors import UserError, first_line
from dpojax.train.state import TrainState
from dpojax.types import PyTree


def best_score(metrics: dict[str, float]) -> float:
    """The number that is highest for the best checkpoint."""
    return -metrics["eval_loss"]


ARRAYS = ("params", "train", "reference")
IN_FLIGHT = 256 << 20


class Checkpoints:
    """The checkpoints below a run's directory.

    Args:
      run: the directory.
      keep_latest: how many are kept, beside the best by eval_loss of those evaluated and saved at the same step.
      read_only: whether another process may be writing here.
      in_flight: bytes that are written at a time, more than the largest array has.
    """

    def __init__(self, run: Path, keep_latest: int = 1, *, read_only: bool = False, in_flight: int = IN_FLIGHT):
        # Orbax logs an error's traceback from each of its threads; we raise it once, as a sentence.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.directory = (run / "checkpoints").absolute()
        best = managers.BestN(get_metric_fn=best_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=best_score,
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep_latest), best]),
            # A reader must leave alone what the run it reads from is just writing.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            # On a CPU, a write that goes on beside the next step keeps a second copy of all that the step changes.
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        arrays = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight / 1e9) for name in ARRAYS}
        handlers = {**arrays, "position": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int:
        """The last complete checkpoint's step; 0 if there is none."""
        return self.manager.latest_step() or 0

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """A context whose errors of writing become one sentence; they never touch the last complete checkpoint."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            text = str(error)
            full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "File too large" in text
            reason = "the disk is full" if full else first_line(error)
            fix = "free some space" if full else "see to it"
            complete = [int(path.name) for path in self.directory.glob("*") if path.name.isdigit()]
            last = f"from step {max(complete)}" if complete else "from the start"
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({reason}); {fix} and give the same "
                f"command again, which continues {last}"
            ) from error

    def save(
        self, state: TrainState, position: dict[str, Any], eval_loss: float | None, moved: PyTree | None = None
    ) -> None:
        """Start writing; training goes on meanwhile. An error of the previous write is raised here.

        Args:
          state: after the step.
          position: of the data.
          eval_loss: of this step, where it was evaluated.
          moved: parameters of a reference that the run itself has changed.
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
        """Write the parameters that no step changes, once a run, whole or not at all."""
        directory = self.directory.with_name("frozen")
        if not directory.exists():
            with self._disk(), ocp.StandardCheckpointer() as writer:
                writer.save(directory, params)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out as the abstract state ``like`` is, and the data position.

        The state's ``hyper`` and ``frozen`` are those of ``like``; no checkpoint holds them.
        """
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
        state = dataclasses.replace(
            like,
            step=train["step"],
            params=items.params,
            opt_state=train["opt_state"],
            rng=key,
            running=train.get("running", {}),
        )
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
def readable(directory: Path, fix: str = "remove this directory, and the one before it is used") -> Iterator[None]:
    """A context in which a checkpoint that cannot be read becomes one sentence."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if not directory.exists():
            raise FileNotFoundError(directory) from error
        raise UserError(f"{directory}: damaged checkpoint ({first_line(error)}); {fix}") from error


def restore_params(directory: Path, shapes: PyTree) -> PyTree:
    """The parameters of a directory, born where the shapes' shardings place them."""
    born = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), shapes
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(directory, args=ocp.args.PyTreeRestore(item=shapes, restore_args=born))
