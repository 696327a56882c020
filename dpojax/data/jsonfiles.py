"""JSON files -> rows: one object a line, an array of objects, an object of columns, an object around an array."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from dpojax.data.opened import FileSource, form_suffix, lines_of
from dpojax.data.read import BadRow, Row, name_of, runs
from dpojax.errors import UserError

LINES, DOCUMENT = "lines", "document"
NO_ROWS = ("tools", "functions")  # lists of objects in a row that are not rows themselves
FORMS = "one object a line, an array of objects, or an object of columns"


def parsed_line(name: str, number: int, line: bytes) -> Row | BadRow:
    """The row of a line."""
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, absurd numbers or nesting
        return BadRow(name, number, f"broken JSON ({error}); each line must be one JSON object")
    if isinstance(fields, dict):
        return Row(name, number, fields)
    return BadRow(name, number, f"a JSON {name_of(fields)}, not an object with named fields")


@dataclasses.dataclass(frozen=True)
class LineBlock:
    """Lines with their numbers; blank ones are left out."""

    name: str
    lines: list[tuple[int, bytes]]

    @property
    def first(self) -> int:
        """The line of its first row."""
        return self.lines[0][0]

    def rows(self) -> list[Row | BadRow]:
        """A row a line."""
        return [parsed_line(self.name, number, line) for number, line in self.lines]


@dataclasses.dataclass(frozen=True)
class ItemBlock:
    """Values that were parsed with the rest of their file."""

    name: str
    first: int
    items: list[Any]

    def rows(self) -> list[Row | BadRow]:
        """A row an item."""
        return [
            Row(self.name, number, item)
            if isinstance(item, dict)
            else BadRow(self.name, number, f"a JSON {name_of(item)}, not an object with named fields")
            for number, item in enumerate(self.items, start=self.first)
        ]


def _is_row_by_row(lines: list[bytes]) -> bool | None:
    """Whether the first lines of a file that are not blank are a row each; None if they do not say."""
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        # A pretty-printed object goes on with a field, a broken line with the next row.
        return True if all(line.lstrip()[:1] == b"{" for line in lines) and len(lines) > 1 else None
    return True if len(lines) > 1 else None


def _is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _is_chat(value: Any) -> bool:
    return _is_list(value, dict) and all("role" in item or "from" in item for item in value)


def _columns(document: dict[str, Any], name: str) -> list[Any] | None:
    """The rows of an object of columns; None if it is none."""
    values = list(document.values())
    whole = bool(values) and all(isinstance(value, list) for value in values) and not any(map(_is_chat, values))
    if not whole or not any(_is_list(value, str) or any(map(_is_chat, value)) for value in values):
        return None
    lengths = {key: len(value) for key, value in document.items()}
    if len(set(lengths.values())) > 1:
        # A row of completions and scores alone is no row of any form: these are columns, some of them cut.
        said = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(f"{name}: an object of columns of different lengths ({said}); give every row every field")
    return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]


def items_of(document: Any, name: str, *, one_line: bool) -> list[Any]:
    """The rows in a JSON document.

    Args:
      document: its value.
      name: of the file.
      one_line: the document is one line, which may be the only row of a JSONL file.

    Raises:
      UserError: the document is in no form that holds rows.
    """
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise UserError(f"{name}: a JSON {name_of(document)}; give {FORMS}")
    columns = _columns(document, name)
    if columns is not None:
        return columns
    lists = [key for key, value in document.items() if _is_list(value, dict) and not _is_chat(value)]
    if len(lists) == 1 and lists[0] not in NO_ROWS:
        return document[lists[0]]
    if one_line:
        return [document]
    several = f" with {len(lists)} lists of objects ({', '.join(lists)})" if len(lists) > 1 else ""
    fields = ", ".join(itertools.islice(document, 5)) or "none"
    raise UserError(f"{name}: one JSON object{several} over several lines (its fields: {fields}); give {FORMS}")


@dataclasses.dataclass(frozen=True)
class JsonSource(FileSource):
    """A JSON file in any of its forms; the content says which.

    One object a line is read line by line. A document is parsed whole, so that it must fit into memory.
    """

    def blocks(self, rows: int) -> Iterator[LineBlock | ItemBlock]:
        """Lines, or items of the document.

        Raises:
          UserError: the file cannot be read, has no rows, or is a document of another form.
        """
        first = list(itertools.islice((line for line in lines_of(self.path, self.name) if line.strip()), 2))
        if not first:
            raise UserError(f"{self.name}: the file is empty; it needs at least one row")
        by_row = _is_row_by_row(first)
        if by_row is None and form_suffix(self.path) != ".json" and len(first) == 1:
            by_row = first[0].lstrip()[:1] != b"["
        items = None if by_row else self._items()
        if items is None:
            numbered = ((i, x) for i, x in enumerate(lines_of(self.path, self.name), start=1) if x.strip())
            yield from (LineBlock(self.name, run) for run in runs(numbered, rows))
            return
        if not items:
            raise UserError(f"{self.name}: the file is empty; it needs at least one row")
        for start in range(0, len(items), rows):
            yield ItemBlock(self.name, start + 1, items[start : start + rows])

    def _items(self) -> list[Any] | None:
        """The document's rows; None if it is no document, nor named as one, so that its lines are rows."""
        data = b"".join(lines_of(self.path, self.name))
        try:
            document = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            if form_suffix(self.path) != ".json":
                return None
            raise UserError(f"{self.name}: broken JSON ({error}); give {FORMS}") from None
        return items_of(document, self.name, one_line=b"\n" not in data.strip())
