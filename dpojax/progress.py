"""Where a long stage is: a bar with the time left on a terminal, a line every few seconds in a log."""

import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0

console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


class Stage:
    """A stage of known length, as a context; `advance` or `reach` says how far it is."""

    def __init__(self, label: str, total: float, done: float = 0):
        self.label, self.total, self.done, self.first = label, total, done, done
        self.note = ""
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        self.start = self.last_line = time.monotonic()
        if console.is_terminal:
            counts = [MofNCompleteColumn()] if isinstance(self.total, int) else []
            text = TextColumn("{task.description}")
            self.bar = Progress(
                text, BarColumn(), *counts, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=int(self.done), note="")
        return self

    def advance(self, n: float = 1, note: str = "") -> None:
        self.reach(self.done + n, note)

    def reach(self, done: float, note: str = "") -> None:
        self.done, self.note = done, note
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            spent = self.last_line - self.start
            left = spent * (self.total - done) / max(done - self.first, 1e-9)
            console.print(f"{self.label}: {self._counts()}, {spent:.0f} s, about {left:.0f} s left {note}".rstrip())

    def _counts(self) -> str:
        if isinstance(self.total, int):
            return f"{self.done:.0f}/{self.total}"
        return f"{100 * self.done / self.total:.0f} %"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif kind is None:
            console.print(f"{self.label}: {self._counts()} in {time.monotonic() - self.start:.1f} s")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items, with their progress shown."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Stage(label, total) as stage:
        for item in items:
            yield item
            stage.advance()
