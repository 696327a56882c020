"""Rows, each with its place, and what a source of them is: a file, a shard or a list of dicts."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from dpojax.errors import UserError

T = TypeVar("T")
IN_MEMORY = "rows"
"""What rows in memory are called where a file would be named: "rows, row 3"."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row is: the line of a JSONL file, the row of another file, or the item of a list, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclasses.dataclass(frozen=True)
class Row(Place):
    """A row: its place and its fields."""

    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BadRow(Place):
    """A row that cannot be used, and why."""

    why: str

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.why}"


class Block(Protocol):
    """A run of consecutive rows of a source, not yet parsed; it can be pickled, so that another process parses it."""

    @property
    def first(self) -> int:
        """The number of its first row."""

    def rows(self) -> list[Row | BadRow]:
        """Its rows, in order."""


class Source(Protocol):
    """One file, or one shard."""

    @property
    def name(self) -> str:
        """As errors and reports name it: "pairs.jsonl", "hub:owner/name, train/0001.parquet", "tfds:NAME, train"."""

    @property
    def beside(self) -> str | None:
        """A local path beside which caches are kept; None where they are kept nowhere."""

    def identity(self) -> str | None:
        """A hash of the bytes and of how they are read; None where it cannot be known."""

    def estimated_rows(self) -> int:
        """Roughly how many rows it has, at least 1; for progress alone."""

    def blocks(self, rows: int) -> Iterator[Block]:
        """All its rows in runs of this many, the last of fewer; the same runs every time.

        Raises:
          UserError: the source cannot be read, or has no rows.
        """


def name_of(value: object) -> str:
    """The JSON name of a value's type."""
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def runs(items: Iterator[T], rows: int) -> Iterator[list[T]]:
    """The items in lists of this many, the last of fewer."""
    while run := list(itertools.islice(items, rows)):
        yield run


def rows_of(source: Source, rows: int = 1024) -> Iterator[Row | BadRow]:
    """The rows of a source, of which this many are in memory at once.

    Raises:
      UserError: the source cannot be read, or has no rows.
    """
    for block in source.blocks(rows):
        yield from block.rows()


def read_rows(files: Sequence[str], *, rows: int = 1024) -> Iterator[Row | BadRow]:
    """The rows of all sources of these names, in order; blank lines of JSONL are no rows.

    Args:
      files: what :func:`dpojax.data.sources.open_sources` takes.
      rows: that are in memory at once.

    Raises:
      UserError: a source is missing, is unreadable or has no rows.
    """
    from dpojax.data.sources import open_sources

    for name in files:
        for source in open_sources(name):
            yield from rows_of(source, rows)


def rows_in_memory(rows: Sequence[Any]) -> Iterator[Row | BadRow]:
    """The rows of a list of dicts, in order.

    Raises:
      UserError: the list is empty.
    """
    if not rows:
        raise UserError(f"{IN_MEMORY}: the list is empty; it needs at least one row")
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            yield BadRow(IN_MEMORY, number, f"a {name_of(fields)}, not a dict with named fields")
        elif not all(isinstance(name, str) for name in fields):
            yield BadRow(IN_MEMORY, number, "a dict with a field whose name is not text; name all fields by text")
        else:
            yield Row(IN_MEMORY, number, fields)
