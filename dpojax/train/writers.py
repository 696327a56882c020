"""Where figures are written: a line of metrics.jsonl for every step, and TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any, Protocol


class Writer(Protocol):
    """Takes a run's figures by step; an OSError that it raises becomes one sentence."""

    name: str
    """Names the writer in an error."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of a step."""

    def flush(self) -> None:
        """Bring to disk all that was taken."""

    def close(self) -> None:
        """Flush, and take no more."""


class JsonLines:
    """metrics.jsonl: a line for every step and for every evaluation.

    Args:
      directory: of the run.
      resume: the step that the run continues from; lines beyond it are dropped. 0 starts anew.
    """

    def __init__(self, directory: Path, resume: int = 0):
        path = directory / "metrics.jsonl"
        self.name = str(path)
        old = path.read_text().splitlines() if path.exists() and resume else []
        path.write_text("".join(line + "\n" for line in old if 0 <= step_of(line) <= resume))
        self.file = path.open("a")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()  # the line is there, whatever happens to the process next

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.file.close()


def step_of(line: str) -> int:
    """The step of a line; -1 of half a line, which a run that was killed may have written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class TensorBoard:
    """TensorBoard's event files; it drops figures that an earlier process wrote beyond the step ``resume``."""

    def __init__(self, directory: Path, resume: int = 0):
        # Imported here, as it imports torch where there is one, which those who only call `fit` need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # Not tensorboardX's SummaryWriter: its thread ends at a full disk without an error, and its queue then blocks.
        self.name = str(directory / "tensorboard")
        (directory / "tensorboard").mkdir(exist_ok=True)
        self.board = EventsWriter(str(directory / "tensorboard" / "events"))
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

    def close(self) -> None:
        self.board.close()
