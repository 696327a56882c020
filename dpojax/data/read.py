"""JSONL files, Parquet files and lists of dicts -> rows, each with its place."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpojax.errors import UserError

IN_MEMORY = "rows"
"""What rows in memory are called where a file would be named: "rows, row 3"."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row is: the line of a JSONL file, the row of a Parquet file, or the item of a list, from 1."""

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


def name_of(value: object) -> str:
    """The JSON name of a value's type."""
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _read_jsonl(path: Path, name: str) -> Iterator[Row | BadRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, absurd numbers or nesting
                yield BadRow(name, number, f"broken JSON ({error}); each line must be one JSON object")
                continue
            if isinstance(fields, dict):
                yield Row(name, number, fields)
            else:
                yield BadRow(name, number, f"a JSON {name_of(fields)}, not an object with named fields")


def _read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: reading Parquet needs pyarrow; run pip install pyarrow, or give JSONL") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = (fields for batch in file.iter_batches() for fields in batch.to_pylist())
        for number, fields in enumerate(rows, start=1):
            yield Row(name, number, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file ({error}); write it again") from None


def read_rows(files: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of all files, in order; blank lines of JSONL are no rows.

    Raises:
      UserError: a file is missing, is unreadable or has no rows.
    """
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{name}: no such file; give a JSONL or Parquet file")
        empty = True
        read = _read_parquet if path.suffix in (".parquet", ".pq") else _read_jsonl
        try:
            for row in read(path, name):
                empty = False
                yield row
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        if empty:
            raise UserError(f"{name}: the file is empty; it needs at least one row")


def rows_in_memory(rows: Sequence[Any]) -> Iterator[Row | BadRow]:
    """The rows of a list of dicts, in order.

    Raises:
      UserError: the list is empty.
    """
    if not rows:
        raise UserError(f"{IN_MEMORY}: the list is empty; it needs at least one row")
    for number, fields in enumerate(rows, start=1):
        if isinstance(fields, dict):
            yield Row(IN_MEMORY, number, fields)
        else:
            yield BadRow(IN_MEMORY, number, f"a {name_of(fields)}, not a dict with named fields")
