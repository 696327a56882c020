"""Rows of JSONL and Parquet files, each with its place, and what they must hold."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpojax.errors import UserError

Message = dict[str, str]
Text = str | list[Message]  # plain text, or chat messages
Part = tuple[Text, tuple[Text, ...]]  # a prompt and its completions, both of one kind


@dataclasses.dataclass(frozen=True)
class Values:
    """What a row says of its completions in numbers."""

    ranks: tuple[int, ...] = ()
    """Of every completion, 0 the best; two of one rank are no pair. Empty: as they stand."""
    scores: tuple[float, ...] = ()
    """Of every completion, where the objective asks by how much one is better."""
    weight: float = 1.0
    label: float = 1.0
    """1 for a desirable completion, 0 for an undesirable one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row and its place: the line of a JSONL file, or the row of a Parquet file, from 1."""

    file: str
    number: int
    fields: dict[str, Any]
    values: Values = Values()  # frozen


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    number: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.why}"


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
                yield BadRow(name, number, f"a JSON {_name(fields)}, not an object with named fields")


def _read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = (fields for batch in file.iter_batches() for fields in batch.to_pylist())
        for number, fields in enumerate(rows, start=1):
            yield Row(name, number, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file ({error}); write it again") from None


def read_rows(files: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of all files, in order; blank lines are no rows.

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


def _name(value: object) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _text(fields: dict[str, Any], name: str, needs: str) -> Text:
    """The field, checked to be text or chat messages."""
    if name not in fields:
        raise ValueError(f"no field {name!r}; {needs}")
    value = fields[name]
    if isinstance(value, str):
        return _unicode(value, name)
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is a {_name(value)}; it must be text or a list of chat messages")
    if not value:
        raise ValueError(f"field {name!r} is an empty list; give it at least one chat message")
    for message in value:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise ValueError(f"field {name!r} has an item that is not a chat message with role and content")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"field {name!r} has a message whose content is not text")
        _unicode(message["content"], name)
    return value


def _unicode(text: str, name: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r} is not valid Unicode (a lone surrogate); mend its escapes") from None
    return text


def _is_empty(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return all(not message["content"].strip() for message in text)


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike."""
    alike = [a == b for a, b in zip(chosen, rejected, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def _conversations(prompt: Text | None, sides: list[list[Message]]) -> Part:
    """Completions as chat messages: after a prompt given as messages, or after the beginning they share."""
    if isinstance(prompt, list):
        if all(side[: len(prompt)] == prompt for side in sides):
            sides = [side[len(prompt) :] for side in sides]
    else:
        shared = min((_shared(sides[0], side) for side in sides[1:]), default=len(sides[0]) - 1)
        if shared == 0:
            raise ValueError("chosen and rejected share no beginning; give the prompt or begin both with it")
        if prompt is not None and all(message["content"] != prompt for message in sides[0][:shared]):
            raise ValueError("prompt is text but chosen and rejected are chats that do not begin with it")
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if any(not side for side in sides):
        raise ValueError("an empty completion: one conversation ends where the other goes on; add the reply")
    return prompt, tuple(sides)


def _part(fields: dict[str, Any], names: tuple[str, ...], needs: str) -> Part:
    sides = [_text(fields, name, needs) for name in names]
    for name, side in zip(names, sides, strict=True):
        if _is_empty(side):
            raise ValueError(f"field {name!r} is an empty completion; give it text or leave the row out")
    prompt = _text(fields, "prompt", needs) if fields.get("prompt") is not None else None
    if all(isinstance(side, str) for side in sides):
        if prompt is None:
            raise ValueError(f"no field 'prompt'; {needs}")
        if isinstance(prompt, list):
            return prompt, tuple([{"role": "assistant", "content": str(side)}] for side in sides)
        return prompt, tuple(sides)
    if any(isinstance(side, str) for side in sides):
        raise ValueError(f"fields {' and '.join(names)} must both be text or both be chat messages")
    return _conversations(prompt, sides)  # type: ignore[arg-type]


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        shown = _name(value) if not isinstance(value, float) else str(value)
        raise ValueError(f"field {name!r} is {shown}; it must be a finite number")
    return float(value)


def _margin(fields: dict[str, Any]) -> float:
    """By how much chosen is better: the field margin, or the difference of the sides' scores."""
    if "margin" in fields:
        margin = _number(fields, "margin")
    elif "score_chosen" in fields and "score_rejected" in fields:
        margin = _number(fields, "score_chosen") - _number(fields, "score_rejected")
    else:
        raise ValueError("no field 'margin'; the objective asks for it, or for score_chosen and score_rejected")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}, so that rejected is better than chosen; exchange them")
    return margin


def _weight(fields: dict[str, Any]) -> float:
    if "weight" not in fields:
        raise ValueError("no field 'weight'; the objective asks for it")
    weight = _number(fields, "weight")
    if weight < 0:
        raise ValueError(f"field 'weight' is {weight:g}; it must be at least 0")
    return weight


def _ranked_of(fields: dict[str, Any]) -> tuple[Part, Values]:
    """A prompt with several completions and their scores, the best first."""
    completions, scores = fields["completions"], fields.get("scores")
    if not (isinstance(completions, list) and isinstance(scores, list) and len(completions) == len(scores)):
        raise ValueError("fields 'completions' and 'scores' must be lists of one length")
    values = [_number({"scores": score}, "scores") for score in scores]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    levels = sorted(set(values), reverse=True)
    if len(levels) < 2:
        raise ValueError("the scores are all equal, or one; a preference needs two completions of different scores")
    for i, completion in enumerate(completions):
        if completion in completions[:i]:
            raise ValueError(f"completion {i + 1} is there twice; leave one out")
    sides = {f"completions[{i + 1}]": completions[i] for i in order}
    needs = "a row has prompt, completions and scores"
    part = _part({"prompt": fields.get("prompt"), **sides}, tuple(sides), needs)
    ordered = [values[i] for i in order]
    return part, Values(tuple(levels.index(score) for score in ordered), tuple(ordered))


def preference_of(row: Row, asked: Sequence[str] = ()) -> tuple[Part, Values]:
    """A preference row: a pair, or several completions with scores, and what the objective asks beside.

    Args:
      row: with prompt, chosen and rejected, or with prompt, completions and scores.
      asked: of "margin" and "weight".

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    fields = row.fields
    if "completions" in fields and "chosen" not in fields:
        part, values = _ranked_of(fields)
    else:
        part, values = pair_of(row), Values()
        if "margin" in asked:
            values = Values(scores=(_margin(fields), 0.0))
    return part, dataclasses.replace(values, weight=_weight(fields)) if "weight" in asked else values


def labelled_of(row: Row) -> tuple[Part, Values]:
    """A prompt, one completion and its label: desirable or not.

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    needs = "a row has prompt, completion and label"
    part = _part(row.fields, ("completion",), needs)
    label = row.fields.get("label")
    if label not in (True, False):  # 1 and 0 too
        raise ValueError("field 'label' must be true (desirable) or false; " + needs)
    return part, Values(label=float(label))


def usable_part(row: Row, kind: str) -> tuple[Part, Values]:
    """Texts and numbers of a row.

    Args:
      row: of a file.
      kind: "pairs", with "margin" and "weight" behind it where the objective asks for them, "completions", "labels".

    Raises:
      ValueError: the row is not usable; the message says why.
    """
    first, *asked = kind.split()
    if first == "completions":
        return completion_of(row), Values()
    return labelled_of(row) if first == "labels" else preference_of(row, asked)


def pair_of(row: Row) -> Part:
    """A preference row's prompt and its (chosen, rejected).

    Raises:
      ValueError: the row is no usable pair; the message says why.
    """
    needs = "a pair has prompt, chosen and rejected"
    for name in ("chosen", "rejected"):
        _text(row.fields, name, needs)
    if row.fields["chosen"] == row.fields["rejected"]:
        raise ValueError("chosen and rejected are equal; a pair needs two different completions")
    return _part(row.fields, ("chosen", "rejected"), needs)


def completion_of(row: Row) -> Part:
    """An SFT row's prompt and its one completion: ``completion``, or a pair's ``chosen`` side.

    Raises:
      ValueError: the row has neither; the message says why.
    """
    if "completion" not in row.fields and "chosen" in row.fields:
        # A pair's sides also say where its prompt ends, if they are whole conversations.
        if "rejected" in row.fields:
            prompt, (chosen, _) = pair_of(row)
            return prompt, (chosen,)
        return _part(row.fields, ("chosen",), "a row has prompt and completion, or is a pair")
    return _part(row.fields, ("completion",), "a row has prompt and completion, or is a pair")
