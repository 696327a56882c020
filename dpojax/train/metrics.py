"""Where a run's figures go: metrics.jsonl (a line for every step), TensorBoard, and the console."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from dpojax.data import IndexedBatch
from dpojax.errors import UserError
from dpojax.progress import console
from dpojax.train.objectives import Metrics

CONSOLE_NAMES = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "rewards/accuracies": "accuracy",
    "eval_rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "eval_rewards/margins": "margin",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
    "pairs_per_second": "pairs/s",
    "tokens_per_second": "tokens/s",
    "padding_share": "padding",
}


class MetricsLog:
    """Figures by step. A run that continues from step ``resume`` drops what was written beyond it.

    Steps are added as undivided device arrays and fetched together by :meth:`flush`, so that the device never waits
    for the log. A step that compiles a new shape counts in no rate.
    """

    def __init__(self, directory: Path, resume: int, total_steps: int, examples: int):
        self.total_steps, self.examples = total_steps, examples
        path = directory / "metrics.jsonl"
        old = path.read_text().splitlines() if path.exists() and resume else []
        path.write_text("".join(line + "\n" for line in old if 0 <= _step_of(line) <= resume))
        self.file = path.open("a")
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk without a word, and its queue then blocks.
        (directory / "tensorboard").mkdir(exist_ok=True)
        self.board = EventsWriter(str(directory / "tensorboard" / "events"))
        # TensorBoard drops what an earlier process wrote beyond this step.
        start = SessionLog(status=SessionLog.START)
        self.board.write_event(Event(wall_time=time.time(), step=resume + 1 if resume else 0, session_log=start))
        self.pending: list[tuple[int, PairCount, Metrics]] = []
        self.unshown: list[dict[str, float]] = []
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self.clock = time.perf_counter()

    def add(self, step: int, item: IndexedBatch, metrics: Metrics) -> None:
        """A step that has been dispatched."""
        shape = tuple(x.shape for x in jax.tree.leaves(item.batch))
        if shape not in self.shapes:
            # Its time is mostly the compiler's: what was pending keeps its rate, this step gets none.
            self.shapes.add(shape)
            jax.block_until_ready(metrics)
            self.pending.append((step, PairCount(item, timed=False), metrics))
            self.clock = time.perf_counter()
        else:
            self.pending.append((step, PairCount(item, timed=True), metrics))

    def flush(self) -> None:
        """Fetch what is pending and write a line for each step."""
        fetched = jax.device_get([metrics for _, _, metrics in self.pending])
        now = time.perf_counter()
        timed = [count for _, count, _ in self.pending if count.timed]
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        for (step, count, _), metrics in zip(self.pending, fetched, strict=True):
            figures = {name: metric.mean for name, metric in metrics.items()}
            if not math.isfinite(figures["loss"]):
                raise UserError(f"step {step}: the loss is {figures['loss']}; try a lower --learning-rate")
            figures["epoch"] = step * count.batch_size / self.examples
            figures["padding_share"] = 1 - count.tokens / count.computed
            if count.timed:
                figures["pairs_per_second"] = sum(c.pairs for c in timed) / seconds
                figures["tokens_per_second"] = sum(c.tokens for c in timed) / seconds
            self.write(step, figures)
            self.unshown.append(figures)
        self.pending.clear()
        with self._disk():
            self.board.flush()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            again = "free some space and give the same command again, which continues from the last checkpoint"
            raise UserError(f"{self.file.name}: cannot be written ({error.strerror}); {again}") from None

    def restart_clock(self) -> None:
        """After an evaluation or a save, whose time counts in no rate; nothing may be pending."""
        self.clock = time.perf_counter()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """A line now, whatever becomes of the process next."""
        with self._disk():
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
            for name, value in figures.items():
                self.board.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def show_steps(self, step: int) -> None:
        """On the console, the means of the steps since the last call."""
        names = dict.fromkeys(name for figures in self.unshown for name in figures)
        means = {name: float(np.mean([f[name] for f in self.unshown if name in f])) for name in names}
        self.show(step, means)
        self.unshown.clear()

    def show(self, step: int, figures: dict[str, float]) -> None:
        shown = [f"{label} {figures[name]:.4g}" for name, label in CONSOLE_NAMES.items() if name in figures]
        console.print(f"step {step}/{self.total_steps}: {', '.join(shown)}")

    def close(self) -> None:
        self.file.close()
        self.board.close()


class PairCount:
    """What a batch holds: pairs, real tokens (the prompt once), and computed positions."""

    def __init__(self, item: IndexedBatch, timed: bool):
        batch = item.batch
        self.timed = timed
        self.pairs = int(batch.valid.sum())
        self.batch_size = len(batch.valid)
        self.tokens = int(batch.prompt_len.sum() + batch.completion_len.sum())
        assert batch.packing is not None
        self.computed = batch.packing.padded_index.size


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # half a line, left behind by a run that was killed
