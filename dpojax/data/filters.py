"""Rows chosen by a column: ``score_chosen>=7``, ``language==en``."""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Mapping
from typing import Any

from dpojax.data.read import name_of
from dpojax.errors import UserError

COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
FORM = "write it as column>=number, with one of >= <= > < == !="


@dataclasses.dataclass(frozen=True)
class Filter:
    """A comparison of a record's column with a number, or for == and != with a text."""

    column: str
    comparison: str
    value: float | str

    def keeps(self, fields: Mapping[str, Any]) -> bool:
        """Whether the record passes.

        Raises:
          ValueError: it has no such column, or what it has there cannot be compared.
        """
        found: Any = fields
        for name in self.column.split("."):  # a column of a column, as in metadata.score
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            raise ValueError(f"no field {self.column!r}, which --filter compares")
        if isinstance(self.value, str):
            found = str(found).lower() if isinstance(found, bool) else found
        if isinstance(found, str) and not isinstance(self.value, str):
            with contextlib.suppress(ValueError):
                found = float(found)  # as CSV has numbers
        if isinstance(found, str) != isinstance(self.value, str) or isinstance(found, list | dict):
            raise ValueError(f"field {self.column!r} is a {name_of(found)}, which --filter compares with {self.value}")
        return bool(COMPARISONS[self.comparison](found, self.value))


def parse_filter(text: str) -> Filter:
    """The filter that a text spells.

    Raises:
      UserError: it spells none.
    """
    match = re.fullmatch(r"\s*([^<>=!]+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", text)
    if not match:
        raise UserError(f"--filter {text!r}: is no comparison; {FORM}")
    column, comparison, value = match.groups()
    try:
        return Filter(column, comparison, float(value))
    except ValueError:
        if comparison not in ("==", "!="):
            raise UserError(f"--filter {text!r}: {value!r} is no number; {FORM}") from None
        return Filter(column, comparison, value.strip("'\""))
