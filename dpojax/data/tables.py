"""Parquet, Arrow, CSV and TSV files -> rows."""

import ast
import contextlib
import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dpojax.data.opened import FileSource, compression_of, form_suffix, open_bytes, open_text, reading
from dpojax.data.read import BadRow, Row, runs
from dpojax.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

PARQUET, ARROW, FEATHER = b"PAR1", b"ARROW1", b"FEA1"
BYTES_A_ROW = 2000  # of an Arrow file, to guess by
MOST_CELL = 2**31 - 1  # characters of a cell of CSV
NUMBERS = {
    *("label", "labels", "margin", "weight", "score", "scores", "rank", "rating", "truncated", "id", "is", "safe"),
    *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
}
"""A column of CSV holds numbers and booleans if one of these is a word of its name ("score_chosen", "is_safe")."""


@dataclasses.dataclass(frozen=True)
class ArrowBlock:
    """Rows of an Arrow table, as the bytes of an IPC stream: a pickled slice would carry its whole table along."""

    name: str
    first: int
    data: bytes

    def rows(self) -> list[Row | BadRow]:
        """A row a row; one with text that is no UTF-8 is bad."""
        import pyarrow

        table = pyarrow.ipc.open_stream(self.data).read_all()
        try:
            return [Row(self.name, number, fields) for number, fields in enumerate(table.to_pylist(), self.first)]
        except UnicodeError:
            return [self._row(table, i) for i in range(table.num_rows)]

    def _row(self, table: "pyarrow.Table", i: int) -> Row | BadRow:
        try:
            return Row(self.name, self.first + i, table.slice(i, 1).to_pylist()[0])
        except UnicodeError as error:
            return BadRow(self.name, self.first + i, f"text that is not UTF-8 ({error}); write it again")


def arrow_blocks(batches: Iterable["pyarrow.RecordBatch"], name: str, rows: int) -> Iterator[ArrowBlock]:
    """Runs of this many rows of batches of any lengths."""
    import pyarrow

    def block(table: "pyarrow.Table", first: int) -> ArrowBlock:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return ArrowBlock(name, first, sink.getvalue().to_pybytes())

    waiting, first = None, 1
    for batch in batches:
        table = pyarrow.Table.from_batches([batch])
        waiting = pyarrow.concat_tables([waiting, table]) if waiting else table
        while waiting.num_rows >= rows:
            yield block(waiting.slice(0, rows), first)
            waiting, first = waiting.slice(rows), first + rows
    if waiting:
        yield block(waiting, first)


@dataclasses.dataclass(frozen=True)
class ArrowSource(FileSource):
    """A Parquet file, or an Arrow file of any kind; a compressed one is decompressed into memory."""

    def estimated_rows(self) -> int:
        """How many a Parquet file says that it has; of another, a guess by its size."""
        import pyarrow
        import pyarrow.parquet

        with contextlib.suppress(pyarrow.ArrowException, OSError, ValueError):
            return max(1, pyarrow.parquet.read_metadata(self.path).num_rows)
        with contextlib.suppress(OSError):
            return max(1, self.path.stat().st_size // BYTES_A_ROW)
        return 1

    def blocks(self, rows: int) -> Iterator[ArrowBlock]:
        """Its rows, a part of the file in memory at a time.

        Raises:
          UserError: the file is not readable, or has no rows.
        """
        import pyarrow

        kind = "Parquet" if form_suffix(self.path) in (".parquet", ".pq") else "Arrow"
        empty = True
        try:
            for block in arrow_blocks(self._batches(rows), self.name, rows):
                empty = False
                yield block
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            why = first_line(error)
            raise UserError(f"{self.name}: not a readable {kind} file ({why}); write it again") from None
        if empty:
            raise UserError(f"{self.name}: the file is empty; it needs at least one row")

    def _batches(self, rows: int) -> Iterator["pyarrow.RecordBatch"]:
        import pyarrow.feather
        import pyarrow.parquet

        if compression_of(self.path):
            with reading(self.name), open_bytes(self.path, self.name) as stream:
                file = pyarrow.BufferReader(stream.read())
        else:
            file = pyarrow.memory_map(str(self.path)) if self.path.stat().st_size else pyarrow.BufferReader(b"")
        with file:
            begin = file.read(6)
            file.seek(0)
            if begin.startswith(PARQUET) or form_suffix(self.path) in (".parquet", ".pq"):
                yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=rows)
            elif begin == ARROW:
                reader = pyarrow.ipc.open_file(file)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            elif begin.startswith(FEATHER):
                yield from pyarrow.feather.read_table(file).to_batches()
            else:
                yield from pyarrow.ipc.open_stream(file)


def _value(column: str, cell: str) -> Any:
    """What a cell of CSV says.

    Raises:
      ValueError: a list or an object that is not JSON.
    """
    begin = cell.lstrip()[:2]
    if begin[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return _text(column, cell)
    if NUMBERS & set(re.split(r"[^a-z]+", column.lower())):
        word = cell.strip().lower()
        if word in ("true", "false"):
            return word == "true"
        for number in (int, float):
            try:
                return number(word)
            except ValueError:
                pass
    return cell


def _text(column: str, cell: str) -> str:
    # pandas writes lists so. Taken as text they would be trained on as they stand.
    if re.match(r"\s*\[?\s*\{\s*'", cell):
        try:
            python = isinstance(ast.literal_eval(cell.strip()), list | dict)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            python = False
        if python:
            raise ValueError(f"field '{column}' is written as Python writes a list; write it as JSON (json.dumps)")
    return cell


@dataclasses.dataclass(frozen=True)
class CellBlock:
    """Rows of cells, which are text."""

    name: str
    first: int
    header: list[str]
    cells: list[list[str]]

    def rows(self) -> list[Row | BadRow]:
        """A row a row of cells; an empty cell is a field that is not there."""
        return [self._row(number, cells) for number, cells in enumerate(self.cells, start=self.first)]

    def _row(self, number: int, cells: list[str]) -> Row | BadRow:
        if len(cells) != len(self.header):
            why = f"{len(cells)} cells under a header of {len(self.header)}; quote cells that hold a delimiter"
            return BadRow(self.name, number, why)
        try:
            fields = {column: _value(column, cell) for column, cell in zip(self.header, cells, strict=True) if cell}
        except ValueError as error:
            return BadRow(self.name, number, str(error))
        return Row(self.name, number, fields)


@dataclasses.dataclass(frozen=True)
class CsvSource(FileSource):
    """A CSV or TSV file with a header; rows count from 1 below it, and blank lines are no rows."""

    def blocks(self, rows: int) -> Iterator[CellBlock]:
        """Its rows of cells.

        Raises:
          UserError: the file cannot be read, its quotes do not match, its header has a name twice or it has no rows.
        """
        csv.field_size_limit(max(csv.field_size_limit(), MOST_CELL))
        first = 1
        with open_text(self.path, self.name) as text:
            delimiter = "\t" if form_suffix(self.path) == ".tsv" else ","
            lines = self._cells(csv.reader(text, delimiter=delimiter, strict=True))
            header = next(lines, [])
            if len(set(header)) < len(header) or not all(header):
                said = ", ".join(repr(name) for name in header)
                raise UserError(f"{self.name}: the header ({said}) must give every column a name of its own")
            for cells in runs(lines, rows):
                yield CellBlock(self.name, first, header, cells)
                first += len(cells)
        if first == 1:
            raise UserError(f"{self.name}: the file is empty; it needs a header and at least one row")

    def _cells(self, lines: Iterator[list[str]]) -> Iterator[list[str]]:
        number = -1
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                where = f"row {number + 1}" if number >= 0 else "the header"
                raise UserError(f"{self.name}, {where}: broken CSV ({error}); quote cells as CSV does") from None
            if cells is None:
                return
            if cells:
                number += 1
                yield cells
