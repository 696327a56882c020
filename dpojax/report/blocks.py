"""What reports are built of, whatever they are written as: notes, tables, charts, pictures, samples."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from dpojax.report.read import Picture, Sample
from dpojax.report.svg import Chart


@dataclasses.dataclass(frozen=True)
class Note:
    """A sentence that a reader must see."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A sentence that explains."""

    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """A command, to be copied."""

    caption: str
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text below a header; ``folded`` ones are opened by whoever wants them."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a run's policy said before training and after, and how many more there are."""

    caption: str
    samples: Sequence[Sample]
    more: int


Block: TypeAlias = Note | Text | Code | Table | Chart | Picture | Samples


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Report:
    """A title, and sections."""

    title: str
    sections: Sequence[Section]
