"""Orbax checkpoints of a run: asynchronous, atomic, the latest few and the best by eval_loss kept, and their content
checked when they are read."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from dpojax import processes
from dpojax.errors import UserError, first_line
from dpojax.models.identity import fingerprint_of
from dpojax.paths import AnyPath, absolute, check_run, exists, in_store, reaching, remove, write_text
from dpojax.progress import console
from dpojax.train.state import TrainState
from dpojax.types import PyTree

T = TypeVar("T")


def best_score(metrics: dict[str, float]) -> float:
    """The number that is highest for the best checkpoint."""
    return -metrics["eval_loss"]


ARRAYS, TEXTS = ("params", "train", "reference"), ("position", "content")
IN_FLIGHT = 256 << 20
PASSING = re.compile("PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED")
"""What TensorStore and JAX say of errors that are not the files'."""
DAMAGES = {
    "NOT_FOUND": "a file of it is missing",
    "OUT_OF_RANGE": "a file of it is cut short",
    "DATA_LOSS": "a file of it has changed",
    "reading array": "an array cannot be read",
}
"""What TensorStore says of files, and we."""


class DamagedCheckpoint(UserError):
    """A checkpoint of which a file is missing, cut short or changed."""


class Restored(NamedTuple):
    """A checkpoint's step and state, the position of the data, and the reference as the run had changed it."""

    step: int
    state: TrainState
    position: dict[str, Any]
    moved: PyTree | None


class Manager(ocp.CheckpointManager):
    """Orbax's, to which a checkpoint whose eval_loss cannot be read is one without."""

    def metrics(self, step: int) -> Any:
        """The metrics of a step; None where there are none."""
        try:
            found = super().metrics(step)
        except ValueError:
            return None
        return found if found and isinstance(found.get("eval_loss"), float) else None


class Checkpoints:
    """The checkpoints below a run's directory.

    Args:
      run: the directory, on a disk or in an object store.
      keep_latest: how many are kept, beside the best by eval_loss of those evaluated and saved at the same step.
      read_only: whether another process may be writing here.
      in_flight: bytes that are written at a time, more than the largest array has.
    """

    def __init__(self, run: AnyPath, keep_latest: int = 1, *, read_only: bool = False, in_flight: int = IN_FLIGHT):
        # Orbax logs an error's traceback from each of its threads; we raise it once, as a sentence.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        check_run(run)
        self.directory = absolute(run / "checkpoints")
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
        handlers = {**arrays, **{name: ocp.JsonCheckpointHandler() for name in TEXTS}}
        with reaching(self.directory):
            self.manager = Manager(epath.Path(str(self.directory)), options=options, item_handlers=handlers)

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
            complete = [int(path.name) for path in self.directory.glob("*") if path.name.isdigit() and finalized(path)]
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
        arrays = {"params": state.params, "train": train, **({} if moved is None else {"reference": moved})}
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
            position=ocp.args.JsonSave(position),
            content=ocp.args.JsonSave({**{k: content_of(x) for k, x in arrays.items()}, "position": text_of(position)}),
        )
        with self._disk():
            needed = sum(map(own_bytes, jax.tree.leaves((state.params, state.opt_state, moved))))
            free = needed if in_store(self.directory) else shutil.disk_usage(self.directory).free
            if not processes.all_of(free >= needed):  # a write that cannot end well is not begun
                raise OSError(errno.ENOSPC, f"No space left on device: {needed:,} bytes needed, {free:,} free")
            self.manager.save(int(state.step), args=items, metrics=metrics)

    def save_frozen(self, params: PyTree) -> None:
        """Write the parameters that no step changes, once a run, whole or not at all."""
        directory = self.directory.with_name("frozen")
        if not (exists(directory) and finalized(directory)):
            with self._disk(), ocp.StandardCheckpointer() as writer:
                writer.save(epath.Path(str(directory)), params, force=True)
                if processes.first():
                    write_text(directory.with_name("frozen.json"), json.dumps({"params": content_of(params)}))

    def restore(self, step: int, like: TrainState, moved: PyTree | None = None) -> Restored:
        """The state of a step, laid out as the abstract state ``like`` is, and what lies beside it.

        The state's ``hyper`` and ``frozen`` are those of ``like``; no checkpoint holds them.

        Args:
          step: of the checkpoint.
          like: the layout.
          moved: layout of a reference that the run itself changes; None where it changes none.

        Raises:
          DamagedCheckpoint: a file is missing, cut short or changed.
        """
        rng = jax.eval_shape(jax.random.key_data, like.rng)
        rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=like.step.sharding)
        train = {"step": like.step, "opt_state": like.opt_state, "rng": rng}
        if like.running:
            train["running"] = like.running
        layouts = {"params": like.params, "train": train}
        if moved is not None:
            layouts["reference"] = jax.tree.map(ocp.utils.to_shape_dtype_struct, moved)
        directory = self.directory / str(step)
        content = read(directory, lambda: content_at(directory))
        position = read(directory, lambda: read_text_item(directory / "position"))
        check_content(directory, content, "position", text_of(position))

        def arrays(name: str) -> PyTree:
            handler = ocp.StandardCheckpointHandler()
            args = ocp.args.StandardRestore(layouts[name])
            tree = read(directory, lambda: handler.restore(epath.Path(str(directory / name)), args=args))
            check_content(directory, content, name, content_of(tree))
            return tree

        params, train = arrays("params"), arrays("train")
        state = dataclasses.replace(
            like,
            step=train["step"],
            params=params,
            opt_state=train["opt_state"],
            rng=jax.random.wrap_key_data(train["rng"]),
            running=train.get("running", {}),
        )
        return Restored(step, state, position, None if moved is None else arrays("reference"))

    def restore_latest(self, like: TrainState, moved: PyTree | None = None) -> Restored:
        """:meth:`restore` of the last checkpoint that is not damaged. Later ones are named on the console and put
        aside, as ``N.damaged``, so that they count for none of those that are kept.

        Raises:
          DamagedCheckpoint: all are.
        """
        damaged: list[tuple[int, DamagedCheckpoint]] = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.restore(step, like, moved)
            except DamagedCheckpoint as error:
                damaged.append((step, error))
                continue
            for _, passed_over in damaged:
                console.print(f"{passed_over}; the one of step {step} is used, and this one is put aside as .damaged")
            self._put_aside([step for step, _ in damaged])
            return restored
        raise all_damaged([error for _, error in damaged])

    def sound(self, step: int, like: TrainState) -> bool:
        """Whether a checkpoint can be restored."""
        try:
            self.restore(step, like)
        except DamagedCheckpoint:
            return False
        return True

    def _put_aside(self, steps: list[int]) -> None:
        """Rename checkpoints, so that they are none."""
        if not steps:
            return
        if processes.first():
            for step in steps:
                aside = self.directory / f"{step}.damaged"
                remove(aside)
                with reaching(aside):
                    (self.directory / str(step)).rename(aside)
        processes.barrier("damaged checkpoints are put aside")
        self.manager.reload()

    def finish(self) -> None:
        """Wait until everything is on disk."""
        with self._disk():
            self.manager.wait_until_finished()
        self.manager.close()


def own_bytes(x: jax.Array) -> int:
    """The bytes of an array that this process writes; of what several devices hold, one does."""
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.replica_id == 0)


def finalized(directory: AnyPath) -> bool:
    """Whether a checkpoint was written to its end."""
    return ocp.utils.is_checkpoint_finalized(epath.Path(str(directory)))


def content_of(tree: PyTree) -> str:
    """A hash of a tree's arrays, which is computed on the devices and is the same on every mesh."""
    return fingerprint_of({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]})


def text_of(value: Any) -> str:
    """A hash of what a JSON file says."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_text_item(directory: AnyPath) -> dict[str, Any]:
    """A checkpoint's item in JSON."""
    return dict(ocp.JsonCheckpointHandler().restore(epath.Path(str(directory))))


def content_at(checkpoint: AnyPath) -> dict[str, str]:
    """The hashes of a checkpoint's items; empty in one of an earlier version, which has none."""
    return read_text_item(checkpoint / "content") if (checkpoint / "content").exists() else {}


def check_content(checkpoint: AnyPath, content: dict[str, str], item: str, found: str) -> None:
    """Refuse an item that is another than was written: TensorStore does not find changed bits in compressed data.

    Raises:
      DamagedCheckpoint: naming the checkpoint.
    """
    if content and content.get(item) != found:
        raise DamagedCheckpoint(f"{checkpoint}: damaged checkpoint (its {item} is not what was written)")


def read(checkpoint: AnyPath, function: Callable[[], T]) -> T:
    """What the function reads of a checkpoint; of several processes, all of them can read it or none goes on.

    Raises:
      DamagedCheckpoint: one of the files that it reads is damaged, here or in another process.
    """
    value, failed = None, None
    try:
        with readable(checkpoint):
            value = function()
    except DamagedCheckpoint as error:
        failed = error
    if not processes.all_of(failed is None):
        failed = failed or DamagedCheckpoint(f"{checkpoint}: damaged checkpoint (another process cannot read it)")
    if failed is not None:
        raise failed
    return value  # type: ignore[return-value]


def all_damaged(errors: list[DamagedCheckpoint]) -> DamagedCheckpoint:
    """The error where no checkpoint is left."""
    none = "no earlier one is left; name another --output to start anew"
    return DamagedCheckpoint(f"{errors[0]}, and {none}" if len(errors) == 1 else f"{errors[0]}, as are all, and {none}")


@contextlib.contextmanager
def readable(directory: AnyPath) -> Iterator[None]:
    """A context in which a checkpoint that cannot be read becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if not directory.exists():
            raise FileNotFoundError(directory) from error
        if PASSING.search(str(error)):
            raise UserError(f"{directory}: cannot be read now ({first_line(error)}); try again") from error
        raise DamagedCheckpoint(f"{directory}: damaged checkpoint ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """What is wrong with a checkpoint, by the error of whoever reads it."""
    known = [words for said, words in DAMAGES.items() if said in str(error)]
    if known:
        return known[0]
    return (
        "a file of it has changed"
        if isinstance(error, ValueError | LookupError | AttributeError)
        else first_line(error)
    )


def restore_params(directory: AnyPath, shapes: PyTree) -> PyTree:
    """The parameters of a directory, born where the shapes' shardings place them."""
    born = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), shapes
    )
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=born)
    return ocp.PyTreeCheckpointHandler().restore(epath.Path(str(directory)), args=args)


def params_of(checkpoint: AnyPath, shapes: PyTree) -> PyTree:
    """The parameters of a checkpoint (:func:`restore_params`), checked.

    Raises:
      DamagedCheckpoint: a file is missing, cut short or changed.
    """
    content = read(checkpoint, lambda: content_at(checkpoint))
    params = read(checkpoint, lambda: restore_params(checkpoint / "params", shapes))
    check_content(checkpoint, content, "params", content_of(params))
    return params


def frozen_of(run: AnyPath, shapes: PyTree) -> PyTree:
    """The parameters that no step of a run changes (:meth:`Checkpoints.save_frozen`), checked.

    Raises:
      DamagedCheckpoint: a file is missing, cut short or changed.
    """
    directory, file = run / "frozen", run / "frozen.json"
    content = read(directory, lambda: json.loads(file.read_text())) if exists(file) else {}
    params = read(directory, lambda: restore_params(directory, shapes))
    check_content(directory, content, "params", content_of(params))
    return params
