"""The catalogue of objectives as a table for a terminal, and as plain lines for everything else."""

import re
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpojax.losses import FAMILIES, LOSSES, WRAPPERS, traits_of
from dpojax.losses.catalogue import entry, needs
from dpojax.show.equations import readable

AROUND = "Wrappers, which go around an objective, as in length_normalized(sigmoid)"
NOTATION = (
    "y_w is the chosen and y_l the rejected completion, |y| its length in tokens, u = log (π(y|x)/π_ref(y|x)) its "
    "log-ratio in nats, h = u_w - u_l the margin, r = β u the implicit reward, σ the logistic function, ℓ a loss, B "
    "the batch's size."
)
Row = tuple[str, str, str, str]
COLUMNS = ("name", "equation", "paper", "needs")
AUTHORS = r"[A-Z][\w'-]+(?: et al\.| and [A-Z][\w'-]+)? \d{4}"


def paper(source: str) -> str:
    """Authors, year and arXiv id of the paper that a docstring's source names first, or its first words.

    >>> paper("TRL's loss type of this name; Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), equation 6.")
    'Lambert et al. 2024, arXiv 2411.15124'
    >>> paper("cross-entropy; added to sigmoid it is a term as in Pang et al. 2024 (arXiv 2404.19733).")
    'cross-entropy'
    """
    first = source.split(";")[0]
    text = source if first.startswith("TRL") else first
    cited = re.search(r"\(arXiv (\d{4}\.\d{5})\)", text)
    authors = re.findall(AUTHORS, text[: cited.start()] if cited else text)
    if not authors:
        return re.split(r"[,.;] ", first.replace("``", ""))[0].rstrip(".")
    return f"{authors[-1]}, arXiv {cited[1]}" if cited else authors[0]


def sections() -> dict[str, list[tuple[str, str, str, str]]]:
    """Rows of name, equation, paper and needs, by heading."""
    grouped = {title: [f.__name__ for f in family] for title, family in FAMILIES.items()} | {AROUND: list(WRAPPERS)}
    functions = LOSSES | WRAPPERS
    return {title: [_row(functions[name]) for name in names] for title, names in grouped.items()}


def _row(function: Callable) -> Row:
    described = entry(function)
    needed = ", ".join(described.needs if described.name in LOSSES else added(described.name)) or "-"
    return described.name, readable(described.equation), paper(described.source) or "-", needed


def added(wrapper: str) -> tuple[str, ...]:
    """What a wrapper needs in addition to the objective that it is around."""
    options = {"with_divergence": ("forward_kl",), "with_label_smoothing": (0.1,)}.get(wrapper, ())
    around = WRAPPERS[wrapper](LOSSES["sigmoid"], *options)
    asked = [need for need in needs(around) if need not in needs(LOSSES["sigmoid"])]
    asked += ["weights"] * ("weight" in traits_of(around).reads)
    asked += ["no reference"] * (not traits_of(around).reference)
    return tuple(asked)


def print_catalogue(console: Console) -> None:
    """Every objective and every wrapper: on a terminal as a table of its width, else a line each, with tabs."""
    if console.is_terminal:
        _print_tables(console, sections())
    else:  # by print, which neither wraps nor expands tabs
        print("\n".join(_lines(sections())), file=console.file)


def _lines(rows: dict[str, list[tuple[str, str, str, str]]]) -> list[str]:
    lines = ["\t".join(COLUMNS)]
    for title, of_title in rows.items():
        lines += ["", f"# {title}", *("\t".join(row) for row in of_title)]
    return [*lines, "", f"# {NOTATION}"]


def _print_tables(console: Console, rows: dict[str, list[tuple[str, str, str, str]]]) -> None:
    widest = max(len(row[0]) for of_title in rows.values() for row in of_title)
    for title, of_title in rows.items():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, leading=1, expand=True)
        # The longest single words, so that equations have the rest of the width.
        for column, width in zip(COLUMNS, (widest, None, 16, 17), strict=True):
            table.add_column(column, width=width, ratio=None if width else 1, overflow="fold")
        for name, equation, cited, needed in of_title:
            table.add_row(name, equation.replace("   ", "\n"), cited.replace(", arXiv", "\narXiv"), needed)
        console.print(table, soft_wrap=False)
    console.print(NOTATION, soft_wrap=False)
