"""A report as Markdown: its notes, tables and samples; the charts are the HTML page's."""

import os
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpojax.paths import in_store
from dpojax.report.blocks import Code, Note, Report, Samples, Table, Text
from dpojax.report.numbers import visible
from dpojax.report.read import Picture
from dpojax.report.svg import Chart


def markdown_page(report: Report, file: str, page: str) -> str:
    """The Markdown of a report.

    Args:
      file: where it will be, to which the paths of pictures are relative.
      page: the name of the HTML page, which has the charts.
    """
    lines = [f"# {plain(report.title)}", ""]
    for section in report.sections:
        lines += [f"## {plain(section.title)}", ""]
        charts = [block.title for block in section.blocks if isinstance(block, Chart)]
        if charts:
            lines += [f"In [{plain(page)}]({link(page)}): {plain(', '.join(charts))}.", ""]
        for block in section.blocks:
            lines += [_picture(block, file), ""] if isinstance(block, Picture) else MARKDOWN[type(block)](block)
    return "\n".join(lines).rstrip("\n") + "\n"


def plain(raw: str) -> str:
    r"""A text as Markdown without markup, in one line.

    >>> print(plain("a|b <i> *c*"))
    a\|b \<i\> \*c\*
    """
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&])", r"\\\1", visible(raw).replace("\n", " "))


def link(path: str) -> str:
    """A path as the target of a link."""
    return re.sub(r"[^\w./~-]", lambda c: "".join(f"%{b:02X}" for b in c[0].encode()), path)


def fenced(raw: str) -> list[str]:
    """A text as it is, in a fence that is longer than any within."""
    shown = visible(raw)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return [f"{ticks}text", shown, ticks]


def _note(note: Note) -> list[str]:
    return [f"> {plain(note.text)}", ""]


def _code(code: Code) -> list[str]:
    return [f"{plain(code.caption)}:", "", *fenced(code.text), ""]


def _table(table: Table) -> list[str]:
    rows = [list(map(plain, row)) for row in (table.header, *table.rows)]
    rows.insert(1, ["---"] * len(table.header))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if table.folded:
        return [f"<details><summary>{escape(visible(table.caption))}</summary>", "", *lines, "", "</details>", ""]
    return [f"**{plain(table.caption)}**", "", *lines, ""]


def _samples(samples: Samples) -> list[str]:
    lines = [f"**{plain(samples.caption)}**", ""]
    for sample in samples.samples:
        for name, said in (("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)):
            lines += [f"{name}:", "", *fenced(said), ""]
    return [*lines, *([f"{samples.more} more are in the directory.", ""] if samples.more else [])]


def _picture(picture: Picture, file: str) -> str:
    """A picture by its path, which is relative to the page where both are on a disk."""
    local = not in_store(picture.place) and not in_store(file)
    path = os.path.relpath(picture.place, Path(file).parent).replace(os.sep, "/") if local else picture.place
    return f"![{plain(picture.name)}]({link(path)})" if local else f"{plain(picture.name)}: {plain(path)}"


MARKDOWN: dict[type, Callable[[Any], Sequence[str]]] = {
    Note: _note,
    Text: lambda block: [plain(block.text), ""],
    Code: _code,
    Table: _table,
    Chart: lambda _: [],
    Samples: _samples,
}
