"""What a published format is, and how its columns are read: each bad one raises a sentence that names it."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from dpojax.data.read import name_of

Record = Mapping[str, Any]
SHOWN = 40
"""How many characters of a value a sentence shows."""

SIDES = ("chosen", "rejected", "completion", "completions", "chosen_ids", "rejected_ids", "completion_ids")
SCORES = (
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
)
"""What others call score_chosen and score_rejected, in otherwise our own rows."""
SCORE_NAMES = (*(name for names in SCORES for name in names), "score_chosen", "score_rejected")


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format of records, and the function that makes a row of ours of one.

    Attributes:
      name: what :func:`~dpojax.data.formats.format_named` takes.
      title: of the data set, or of who writes the format.
      reads: the columns that are read; others are unused. Empty: not known.
      matches: whether a record is of this format, by its columns and their shapes; no two formats match one record.
      row: a record -> a row of ours; raises ValueError with one sentence that names the column and the fix.
      group: consecutive records that agree in this column are one: ``{group: value, "records": [...]}``.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    matches: Callable[[Record], bool]
    row: Callable[[dict[str, Any]], dict[str, Any]]
    group: str | None = None


def never(record: Record) -> bool:
    """False: the format is read only where it is named."""
    return False


def has(record: Record, *columns: str) -> bool:
    """Whether a record has all of these columns, null or not."""
    return all(column in record for column in columns)


def lacks(record: Record, *columns: str) -> bool:
    """Whether each of these columns is absent or null; a table has a column where only some of its rows do."""
    return all(record.get(column) is None for column in columns)


def first_of(record: Record, column: str) -> Record:
    """The first object of a column that is a list of them; empty where it is none."""
    value = record.get(column)
    first = value[0] if isinstance(value, list) and value else None
    return first if isinstance(first, dict) else {}


def has_scores(record: Record) -> bool:
    """Whether a record has the scores of two sides under others' names."""
    return any(has(record, *names) for names in SCORES)


def are_conversations(record: Record) -> bool:
    """Whether both sides are whole conversations, which hold their prompt."""
    sides = [record.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(side, list) for side in sides) and lacks(record, "conversations")


def is_ours(record: Record) -> bool:
    """Whether a record is a row of ours as it is: a prompt and completions, under our names."""
    prompted = not lacks(record, "prompt", "prompt_ids") and not lacks(record, *SIDES)
    return (prompted or are_conversations(record)) and not has_scores(record)


def a(value: Any) -> str:
    """A value's JSON type with its article, for a sentence."""
    name = name_of(value)
    return name if name == "null" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """The beginning of a value, in one line."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits
        return a(value)
    return written if len(written) <= SHOWN else f"{written[: SHOWN - 3]}..."


def value_of(record: Record, column: str) -> Any:
    """The value of a column, null or not.

    Raises:
      ValueError: the record has no such column.
    """
    if column not in record:
        raise ValueError(f"no column {column!r}; add it, or name the format that the records have")
    return record[column]


def text_of(record: Record, column: str) -> str:
    """The text of a column, which may be empty.

    Raises:
      ValueError: the column is missing or is no text.
    """
    value = value_of(record, column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {a(value)}; it must be text")
    return value


def reply_of(record: Record, column: str) -> str:
    """The text of a column that is somebody's reply.

    Raises:
      ValueError: the column is missing, is no text or is empty.
    """
    value = text_of(record, column)
    if not value.strip():
        raise ValueError(f"column {column!r} is an empty reply; give it text, or leave the record out")
    return value


def items_of(record: Record, column: str, least: int = 1) -> list[Any]:
    """The items of a column that is a list.

    Raises:
      ValueError: the column is missing, is no list or has fewer items than ``least``.
    """
    value = value_of(record, column)
    if not isinstance(value, list):
        raise ValueError(f"column {column!r} is {a(value)}; it must be a list")
    if len(value) < least:
        raise ValueError(f"column {column!r} has {len(value)} items; it must have at least {least}")
    return value


def object_of(value: Any, where: str) -> dict[str, Any]:
    """A value that is an object with named fields.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"column {where!r} is {a(value)}; it must be an object")
    return value


def fields_of(record: Record, column: str, field: str, read: Callable[[Record, str], Any]) -> list[Any]:
    """One field of every object in a list, read by ``read``.

    Raises:
      ValueError: an object is none, or has a bad field.
    """
    values = []
    for i, item in enumerate(items_of(record, column)):
        where = f"{column}[{i}]"
        fields = object_of(item, where)
        named = {f"{where}.{field}": fields[field]} if field in fields else {}
        values.append(read(named, f"{where}.{field}"))
    return values


def number_of(record: Record, column: str) -> float:
    """The number of a column.

    Raises:
      ValueError: the column is missing or is no finite number.
    """
    value, finite = value_of(record, column), False
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer beyond floating point
            finite = False
    if not finite:
        raise ValueError(f"column {column!r} is {shown(value)}; it must be a finite number")
    return float(value)


def choice_of(record: Record, column: str, choices: Collection[int], fix: str) -> int:
    """The number of a column, one of a few whole ones.

    Raises:
      ValueError: the column is missing or is another value; ``fix`` says what it must be.
    """
    value = value_of(record, column)
    if isinstance(value, bool) or not isinstance(value, Real) or value not in choices:
        raise ValueError(f"column {column!r} is {shown(value)}; {fix}")
    return next(choice for choice in choices if choice == value)


def label_of(record: Record, column: str) -> bool:
    """The label of a column: true, or 1, for a desirable completion.

    Raises:
      ValueError: the column is missing or is another value.
    """
    value = value_of(record, column)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"column {column!r} is {shown(value)}; it must be true (desirable) or false")
    return bool(value)


def scores_where_present(record: Record, chosen: str, rejected: str) -> dict[str, float]:
    """The fields score_chosen and score_rejected, where neither of two columns is absent or null.

    Raises:
      ValueError: a score is no finite number.
    """
    if record.get(chosen) is None or record.get(rejected) is None:
        return {}
    return {"score_chosen": number_of(record, chosen), "score_rejected": number_of(record, rejected)}


def scores_of(record: Record) -> dict[str, float]:
    """The fields score_chosen and score_rejected, under our names or another's, where they are there.

    Raises:
      ValueError: a score is no finite number.
    """
    names = (*SCORES, ("score_chosen", "score_rejected"))
    found = (scores_where_present(record, *pair) for pair in names)
    return next((fields for fields in found if fields), {})
