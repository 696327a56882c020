"""Tables of what ``results.json`` files hold, whatever that is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpojax.report.blocks import Table
from dpojax.report.curves import is_curve
from dpojax.report.numbers import shown, with_error
from dpojax.report.read import value_of


def tables_of(found: Iterable[tuple[str, Any]]) -> list[Table]:
    """A table for each group of the files' content; those of the same name are one.

    A list of objects, and an object of objects, is a table with a row for each; single values are a table of two
    columns. Curves of reward against KL are left to the chart, and long lists of numbers are counted, not shown.

    Args:
      found: ``(name, content)`` of each file; names, if any, are the first column.
    """
    tables: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}

    def take(owner: str, title: str, value: Any, kls: Any) -> None:
        named = enumerate(value, 1) if isinstance(value, list) else value.items()
        items: list[tuple[str, Any]] = [(str(k), _by_kl(v, kls)) for k, v in named if not is_curve(v)]
        inner = {k: v for k, v in items if isinstance(v, dict) and value_of(v) is None}
        if inner and len(inner) == len(items) and all(map(_is_row, inner.values())):
            tables.setdefault(title, []).extend((owner, key, row) for key, row in inner.items())
            return
        lists = {k: v for k, v in items if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
        plain = {k: v for k, v in items if k not in inner and k not in lists}
        for key, nested in (inner | lists).items():
            take(owner, f"{title}, {key}" if title else key, nested, kls)
        if plain:
            tables.setdefault(title or "Results", []).extend((owner, key, {"value": v}) for key, v in plain.items())

    for owner, content in found:
        if isinstance(content, dict | list) and content:
            take(owner, "", content, content.get("kl") if isinstance(content, dict) else None)
    return [_merged(title, rows) for title, rows in tables.items()]


def _by_kl(raw: Any, kls: Any) -> Any:
    """Estimates by KL, whose means and errors are lists as long as that of the KLs, as one estimate for each."""
    if not isinstance(raw, dict) or not isinstance(kls, list):
        return raw
    means, errors = raw.get("mean"), raw.get("error")
    if not all(isinstance(x, list) and len(x) == len(kls) for x in (means, errors)):
        return raw
    pairs = zip(kls, means, errors, strict=True)  # type: ignore[arg-type]
    return {f"KL {shown(kl)}": None if mean is None else {"mean": mean, "error": error} for kl, mean, error in pairs}


def _is_row(raw: Mapping[str, Any]) -> bool:
    return all(not isinstance(x, dict) or value_of(x) is not None for x in raw.values())


def _merged(title: str, rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """One table of rows, each with whose it is; single values have their owners side by side."""
    title = title[:1].upper() + title[1:]
    owners = list(dict.fromkeys(owner for owner, _, _ in rows))
    columns = list(dict.fromkeys(name for _, _, row in rows for name in row))
    if columns == ["value"]:
        keys = list(dict.fromkeys(key for _, key, _ in rows))
        values = {(owner, key): _cell(row["value"]) for owner, key, row in rows}
        header = ["what", *(owner or "value" for owner in owners)]
        return Table(title, header, [[key, *(values.get((owner, key), "") for owner in owners)] for key in keys])
    owned, named = owners != [""], "row" if all(key.isdecimal() for _, key, _ in rows) else "name"
    cells = [
        [*([owner] if owned else []), key, *(_cell(row[name], in_row=True) if name in row else "" for name in columns)]
        for owner, key, row in rows
    ]
    return Table(title, [*(["run"] if owned else []), named, *columns], cells)


def _cell(raw: Any, *, in_row: bool = False) -> str:
    """A value; in a row of several, a pair of a number and a number or nothing is a mean and its error."""
    pair = in_row and isinstance(raw, list) and len(raw) == 2 and isinstance(raw[0], float | None)
    if pair and isinstance(raw[1], float | None):
        value = value_of({"mean": raw[0], "error": raw[1]})
        return with_error(value) if value else shown(None)
    value = value_of(raw)
    return with_error(value) if value else json.dumps(raw) if isinstance(raw, dict) else shown(raw)
