"""A run's figures by step: fetched together, with rates, to the writers and to the console."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dpojax.data import IndexedBatch
from dpojax.errors import UserError
from dpojax.progress import console
from dpojax.train.objectives import Metrics
from dpojax.train.writers import Writer

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


STANDS_STILL = 1e-4
"""How near to ln 2, nats, the loss of a policy is that is its reference still."""


class MetricsLog:
    """Figures by step.

    Steps are added as undivided device arrays and fetched together by :meth:`flush`, so that the device never waits
    for the log. A step that compiles a new shape counts in no rate.

    Args:
      writers: take every figure.
      total_steps: of the run.
      examples: of an epoch.
      patience: steps after which a loss that has never left ln 2 is said to stand still; None: it is not looked at.
    """

    def __init__(self, writers: Sequence[Writer], total_steps: int, examples: int, patience: int | None = None):
        self.writers, self.total_steps, self.examples = writers, total_steps, examples
        self.pending: list[tuple[int, PairCount, Metrics]] = []
        self.unshown: list[dict[str, float]] = []
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self.patience, self.moved = patience, False
        self.clock = time.perf_counter()

    def add(self, step: int, item: IndexedBatch, metrics: Metrics) -> None:
        """Take a step that has been dispatched."""
        shape = tuple(x.shape for x in jax.tree.leaves(item.batch))
        new = shape not in self.shapes
        if new:
            # Its time is mostly the compiler's: pending steps keep their rate, this step gets none.
            self.shapes.add(shape)
            jax.block_until_ready(metrics)
        self.pending.append((step, PairCount(item, timed=not new), metrics))
        if new:
            self.clock = time.perf_counter()

    def flush(self) -> None:
        """Fetch the pending steps, and write the figures of each.

        Raises:
          UserError: the loss is not finite, or the disk is full.
        """
        fetched = jax.device_get([metrics for _, _, metrics in self.pending])
        now = time.perf_counter()
        timed = [count for _, count, _ in self.pending if count.timed]
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        for (step, count, _), metrics in zip(self.pending, fetched, strict=True):
            figures = {name: metric.mean for name, metric in metrics.items()}
            if not math.isfinite(figures["loss"]):
                raise UserError(f"step {step}: the loss is {figures['loss']}; try a lower --learning-rate")
            self._look(step, figures)
            figures["epoch"] = step * count.batch_size / self.examples
            figures["padding_share"] = 1 - count.tokens / count.computed
            if count.timed:
                figures["pairs_per_second"] = sum(c.pairs for c in timed) / seconds
                figures["tokens_per_second"] = sum(c.tokens for c in timed) / seconds
            self.write(step, figures)
            self.unshown.append(figures)
        self.pending.clear()
        for writer in self.writers:
            with self._disk(writer):
                writer.flush()

    def _look(self, step: int, figures: dict[str, float]) -> None:
        """Say once that the loss has not left ln 2, where it stands as long as the policy is its reference."""
        self.moved = self.moved or abs(figures["loss"] - math.log(2)) > STANDS_STILL
        if step == self.patience and not self.moved:
            figures["loss_stands_still"] = 1.0
            console.print(
                f"step {step}: the loss is ln 2 still, as if nothing were learned; try a higher --learning-rate or, "
                "with an adapter, --lora-init a-zero"
            )

    @contextlib.contextmanager
    def _disk(self, writer: Writer) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            again = "free some space and give the same command again, which continues from the last checkpoint"
            raise UserError(f"{writer.name}: cannot be written ({error.strerror}); {again}") from None

    def restart_clock(self) -> None:
        """Leave the time of an evaluation or a save out of the rates; nothing may be pending."""
        self.clock = time.perf_counter()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Give the figures of a step to every writer."""
        for writer in self.writers:
            with self._disk(writer):
                writer.write(step, figures)

    def sync(self) -> None:
        """Bring all figures to where they are kept, so that none of a checkpoint's steps is missing beside it."""
        for writer in self.writers:
            with self._disk(writer):
                writer.sync()

    def show_steps(self, step: int) -> None:
        """Print the means of the steps since the last call."""
        names = dict.fromkeys(name for figures in self.unshown for name in figures)
        means = {name: float(np.mean([f[name] for f in self.unshown if name in f])) for name in names}
        self.show(step, means)
        self.unshown.clear()

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Print figures of a step."""
        shown = [f"{label} {figures[name]:.4g}" for name, label in CONSOLE_NAMES.items() if name in figures]
        console.print(f"step {step}/{self.total_steps}: {', '.join(shown)}")

    def close(self) -> None:
        """Close every writer."""
        for writer in self.writers:
            writer.close()


class PairCount:
    """Pairs, tokens (the prompt once) and computed positions of a global batch."""

    def __init__(self, item: IndexedBatch, timed: bool):
        self.timed = timed
        self.pairs = int((item.index >= 0).sum())
        self.batch_size = len(item.index)
        self.tokens, self.computed = item.tokens, item.computed
