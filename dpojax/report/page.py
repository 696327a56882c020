"""A report as one HTML page that needs nothing beside itself: no script, no font, no file, no network."""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

import dpojax
from dpojax.report.blocks import Code, Note, Report, Samples, Section, Table, Text
from dpojax.report.numbers import visible
from dpojax.report.read import Picture
from dpojax.report.svg import Chart, draw, swatch

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load and run of the page: its own style and its own pictures, and no script at all."""
NUMBER = re.compile(r"[-−]?(\d[\d,.]*(e[+-]?\d+)?|nan|inf)( ± .*)?|–|")
LONG = 32
"""Letters of a cell, such as a path, from which on it is broken where there is no space."""
THEMES = ("system", "light", "dark")


def html_page(report: Report) -> str:
    """The page of a report, whole."""
    title = text(report.title)
    ids = {section.title: f"section-{i}" for i, section in enumerate(report.sections, 1)}
    links = "".join(f'<li><a href="#{ids[s.title]}">{text(s.title)}</a></li>' for s in report.sections)
    choices = "".join(
        f'<label><input type="radio" name="theme" id="{name}"{" checked" * (name == "system")}> {name}</label>'
        for name in THEMES
    )
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>\n{files('dpojax.report').joinpath('style.css').read_text()}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{title}</h1><fieldset><legend>Colours</legend>{choices}</fieldset></header>",
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        "<main>",
        *(line for section in report.sections for line in _section(section, ids[section.title])),
        "</main>",
        f"<footer>Written by dpojax {text(dpojax.__version__)} from the directories' own files.</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def text(raw: str) -> str:
    """A text as HTML, whatever it holds; characters that cannot be seen, by their codes.

    >>> text("<script> & \\x00")
    '&lt;script&gt; &amp; \\\\x00'
    """
    return escape(visible(raw), quote=True)


def _section(section: Section, identity: str) -> list[str]:
    lines = [f'<section aria-labelledby="{identity}">', f'<h2 id="{identity}">{text(section.title)}</h2>']
    for is_chart, blocks in groupby(section.blocks, lambda block: isinstance(block, Chart | Picture)):
        inner = [line for block in blocks for line in HTML[type(block)](block)]
        lines += ['<div class="charts">', *inner, "</div>"] if is_chart else inner
    return [*lines, "</section>"]


def _note(note: Note) -> list[str]:
    return [f'<p class="note" role="note">{text(note.text)}</p>']


def _text(block: Text) -> list[str]:
    return [f"<p>{text(block.text)}</p>"]


def _code(code: Code) -> list[str]:
    return [f"<p>{text(code.caption)}:</p>", f"<pre>{text(code.text)}</pre>"]


def _table(table: Table) -> list[str]:
    """A table with headers of columns and rows; columns of numbers are set to the right."""
    right = [_is_number(row[i] for row in table.rows) for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{" class=number" * r}>{text(name)}</th>' for name, r in zip(table.header, right, strict=True)
    )
    lines = [f'<div class="scroll" role="group" aria-label="{text(table.caption)}" tabindex="0"><table>']
    lines += [] if table.folded else [f"<caption>{text(table.caption)}</caption>"]
    lines += [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for row in table.rows:
        cells = [f"{named}>{text(cell)}" for named, cell in zip(map(_class, row, right), row, strict=True)]
        lines.append(f'<tr><th scope="row"{cells[0]}</th>{"".join(f"<td{cell}</td>" for cell in cells[1:])}</tr>')
    lines += ["</tbody>", "</table></div>"]
    return [f"<details><summary>{text(table.caption)}</summary>", *lines, "</details>"] if table.folded else lines


def _class(cell: str, right: bool) -> str:
    """The class of a cell: numbers are not broken, and what is long may be, anywhere."""
    return ' class="number"' if right else ' class="long"' if len(cell) > LONG else ""


def _is_number(cells: Iterable[str]) -> bool:
    return all(NUMBER.fullmatch(cell) for cell in cells)


def _chart(chart: Chart) -> list[str]:
    svg = draw(chart)
    if not svg:
        return []
    named = "".join(f"<li>{swatch(series)}{text(series.name)}</li>" for series in chart.legend())
    says = text(chart.says)
    return [
        f"<figure{' class=wide' if chart.large else ''}>",
        f"<figcaption><b>{text(chart.title)}</b>{says}</figcaption>",
        *([f"<ul>{named}</ul>"] if named else []),
        svg,
        "</figure>",
    ]


def _picture(picture: Picture) -> list[str]:
    name = text(picture.name)
    return [
        '<figure class="wide">',
        f"<figcaption><b>{name}</b>{text(picture.place)}</figcaption>",
        f'<img src="{picture.uri}" alt="{name}, a figure of {text(picture.place)}">',
        "</figure>",
    ]


def _samples(samples: Samples) -> list[str]:
    lines = [f"<p><b>{text(samples.caption)}</b></p>"]
    for sample in samples.samples:
        lines += ['<div class="sample">', "<h3>Prompt</h3>", _quoted(sample.prompt), '<div class="sides">']
        lines += ["<div><h3>Before</h3>", _quoted(sample.before), "</div>"]
        lines += ["<div><h3>After</h3>", _quoted(sample.after), "</div>", "</div>", "</div>"]
    return [*lines, *([f"<p>{samples.more} more are in the directory.</p>"] if samples.more else [])]


def _quoted(raw: str) -> str:
    return f'<p dir="auto">{text(raw) or "(nothing)"}</p>'


HTML: dict[type, Callable[[Any], Sequence[str]]] = {
    Note: _note,
    Text: _text,
    Code: _code,
    Table: _table,
    Chart: _chart,
    Picture: _picture,
    Samples: _samples,
}
