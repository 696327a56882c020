"""Where figures are written: a line of metrics.jsonl for every step, TensorBoard, and Weights & Biases."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpojax.errors import UserError, first_line
from dpojax.paths import AnyPath, exists, in_store, reaching, scratch, write_bytes
from dpojax.progress import console
from dpojax.train.session import session_of

SECONDS_BETWEEN_UPLOADS = 60.0
UPLOAD_SHARE = 0.01
"""Of the time between them, that uploads of growing files take at most."""


class Writer(Protocol):
    """Takes a run's figures by step; an OSError that it raises becomes one sentence."""

    name: str
    """Names the writer in an error."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of a step."""

    def flush(self) -> None:
        """Bring to disk all that was taken; to an object store, now and then."""

    def sync(self) -> None:
        """Bring to disk, or to the object store, all that was taken."""

    def close(self) -> None:
        """Sync, and take no more."""


class Growing:
    """A directory whose files grow: the given one, or, of one in an object store, where nothing can be appended to, one
    on a disk, whose files are put there whole, now and then."""

    def __init__(self, directory: AnyPath):
        self.target = directory
        self.aside = tempfile.TemporaryDirectory(prefix="dpojax-") if in_store(directory) else None
        self.directory = Path(self.aside.name) if self.aside else directory
        self.sizes: dict[str, int] = {}
        self.due = time.monotonic() + SECONDS_BETWEEN_UPLOADS

    def flush(self) -> None:
        """:meth:`sync`, if the last is some time ago; a store that does not answer is asked again the next time."""
        if self.aside and time.monotonic() >= self.due:
            with contextlib.suppress(UserError):
                self.sync()

    def sync(self) -> None:
        """Put the files that have grown into the object store."""
        if self.aside is None:
            return
        start = time.monotonic()
        for path in sorted(self.directory.iterdir()):
            if self.sizes.get(path.name) != (size := path.stat().st_size):
                write_bytes(self.target / path.name, path.read_bytes())
                self.sizes[path.name] = size
        end = time.monotonic()
        self.due = end + max(SECONDS_BETWEEN_UPLOADS, (end - start) / UPLOAD_SHARE)

    def close(self) -> None:
        """Sync, and remove the directory on the disk."""
        self.sync()
        if self.aside:
            self.aside.cleanup()


class JsonLines:
    """metrics.jsonl: a line for every step and for every evaluation.

    Args:
      directory: of the run.
      resume: the step that the run continues from; lines beyond it are dropped. 0 starts anew.
    """

    def __init__(self, directory: AnyPath, resume: int = 0):
        there = directory / "metrics.jsonl"
        self.name, self.growing = str(there), Growing(directory)
        with reaching(there):
            old = there.read_bytes().decode().splitlines() if resume and exists(there) else []
        path = self.growing.directory / there.name
        path.write_text("".join(line + "\n" for line in old if 0 <= step_of(line) <= resume))
        self.file = path.open("a")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()  # the line is there, whatever happens to the process next

    def flush(self) -> None:
        self.growing.flush()

    def sync(self) -> None:
        self.growing.sync()

    def close(self) -> None:
        self.file.close()
        self.growing.close()


def step_of(line: str) -> int:
    """The step of a line; -1 of half a line, which a run that was killed may have written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class TensorBoard:
    """TensorBoard's event files; it drops figures that an earlier process wrote beyond the step ``resume``."""

    def __init__(self, directory: AnyPath, resume: int = 0):
        # Imported here, as it imports torch where there is one, which those who only call `fit` need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # Not tensorboardX's SummaryWriter: its thread ends at a full disk without an error, and its queue then blocks.
        self.name, self.growing = str(directory / "tensorboard"), Growing(directory / "tensorboard")
        self.growing.directory.mkdir(exist_ok=True)
        self.board = EventsWriter(str(self.growing.directory / "events"))
        self._event(resume + 1 if resume else 0, session_log=SessionLog(status=SessionLog.START))

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.board.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, figures: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in figures.items():
            self._event(step, summary=scalar(name, value))

    def flush(self) -> None:
        self.board.flush()
        self.growing.flush()

    def sync(self) -> None:
        self.board.flush()
        self.growing.sync()

    def close(self) -> None:
        self.board.close()
        self.growing.close()


UPLOAD_SECONDS = 60.0
"""What W&B has for its uploads at the end of a run; what is then missing lies below ``wandb/``, for ``wandb sync``."""


class WandB:
    """A run of Weights & Biases; what fails there is said in one sentence, and training goes on without it.

    Its own variables say where it goes: ``WANDB_PROJECT`` (default: dpojax), ``WANDB_MODE=offline`` and so on. A run
    that continues is the same one there, by the id that ``run.json`` keeps.

    Args:
      directory: of the run; W&B's files are below it, or, of one in an object store, in the temporary directory.
      own: what ``run.json`` holds, this session included; it becomes the W&B run's config.
    """

    name = "W&B"

    def __init__(self, directory: AnyPath, own: Mapping[str, Any]):
        self.run: Any = None
        self.first = 0
        session = session_of(own)
        with self._surviving():
            import wandb

            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dpojax"),
                name=session["name"],
                id=session["wandb"],
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(scratch(directory))),
                config=dict(own),
                # Its capture of the console would take the terminal from the progress bars.
                settings=wandb.Settings(console="off", finish_timeout=UPLOAD_SECONDS),
            )
            self.first = self.run.step  # what W&B has of later steps than the checkpoint's, it keeps

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the network, of its service's process, of its login
            self.run = None
            console.print(f"W&B: {first_line(error).rstrip('.')}; the run goes on without it")

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self.run is not None and step >= self.first:
            with self._surviving():
                self.run.log(figures, step=step)

    def flush(self) -> None:
        """Its own process sends what it has."""

    def sync(self) -> None:
        """As :meth:`flush`."""

    def close(self) -> None:
        if self.run is not None:
            with self._surviving():
                self.run.finish()


def writers_of(directory: AnyPath, report_to: Sequence[str], own: Mapping[str, Any], resume: int) -> list[Writer]:
    """The writers of a run: metrics.jsonl, and those that ``--report-to`` names.

    Args:
      directory: of the run.
      report_to: "tensorboard", "wandb" or "none".
      own: what ``run.json`` holds.
      resume: the step that the run continues from; 0 starts anew.
    """
    writers: list[Writer] = [JsonLines(directory, resume)]
    writers += [TensorBoard(directory, resume)] if "tensorboard" in report_to else []
    writers += [WandB(directory, own)] if "wandb" in report_to else []
    return writers
