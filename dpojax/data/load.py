"""Sources, or rows in memory -> examples in tokens, cut to a length, and a report of what became of every row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from dpojax.data.cache import SourceTokens, encoder_identity, memory_tokens, source_tokens
from dpojax.data.dialogue import OPTIONAL, PAIRS, RowKind
from dpojax.data.encode import Encoder
from dpojax.data.examples import Cut, Examples, cut_to
from dpojax.data.filters import Filter
from dpojax.data.prepare import Reading
from dpojax.data.read import BadRow, Place
from dpojax.data.sources import open_sources
from dpojax.errors import UserError

MIN_PROMPT_LENGTH = 64
SHOWN = 3  # names of sources in one sentence
COLUMNS, LONG = 20, 80  # names of columns in one sentence, and letters of one


@dataclasses.dataclass
class Report:
    """What became of the rows.

    Attributes:
      rows: all of them; a pair that becomes two labelled rows counts twice.
      cached: rows whose tokens an earlier run has kept.
      filtered: rows that a filter left out.
      dropped: rows that cannot be used, in order.
      prompts_cut, completions_cut: rows whose prompt, or a completion, was cut.
      remarks: sentences on what was found and what was not read.
      beside: a file beside which caches of all rows are kept; None where they are kept nowhere.
    """

    rows: int = 0
    cached: int = 0
    filtered: int = 0
    dropped: list[BadRow] = dataclasses.field(default_factory=list)
    prompts_cut: int = 0
    completions_cut: int = 0
    remarks: list[str] = dataclasses.field(default_factory=list)
    beside: str | None = dataclasses.field(default=None, compare=False)

    @property
    def kept(self) -> int:
        """Rows that are examples now."""
        return self.rows - self.filtered - len(self.dropped)

    def sentence(self) -> str:
        """The report in one line, for the console."""
        filtered = f"{self.filtered} left out by --filter, " if self.filtered else ""
        cut = f"{self.prompts_cut} prompts and {self.completions_cut} completions cut to fit"
        cached = f" (tokens of {self.cached} rows from the cache)" if self.cached else ""
        if self.cached == self.rows > 0:
            cached = " (tokens from the cache)"
        return f"{self.rows} rows: {self.kept} kept, {filtered}{len(self.dropped)} dropped, {cut}{cached}"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A source's rows as a run has them.

    Attributes:
      rows: ``[n]``, the usable ones, by their index in the tokens.
      cut: what is kept of them.
      prompts_cut, completions_cut: ``[n]``, whether the prompt, or a completion, was cut.
      bad: the unusable ones, in order.
    """

    rows: np.ndarray
    cut: Cut
    prompts_cut: np.ndarray
    completions_cut: np.ndarray
    bad: list[BadRow]


def judged(source: SourceTokens, kind: RowKind, max_length: int, min_prompt_length: int) -> Judged:
    """A source's rows cut to ``max_length``; those that a run of this kind cannot use, or that train nothing once they
    are cut, are bad."""
    tokens = source.tokens.tokens
    lengths, missing = np.asarray(tokens.lengths), np.asarray(tokens.missing)
    cut = cut_to(lengths, max_length, min_prompt_length)
    room = max_length - cut.prompt
    whys: dict[int, str] = {}

    def refuse(rows: np.ndarray, why: Callable[[int], str]) -> None:
        for i in np.flatnonzero(rows).tolist():
            whys.setdefault(i, why(i))

    for k, name in enumerate(OPTIONAL):
        if getattr(kind, name):
            refuse(missing[:, k] >= 0, lambda i, k=k: tokens.reasons[missing[i, k]])  # type: ignore[misc]
    fix = f"with --max-length {max_length}; raise it, or leave the row out"
    several = lengths[:, 1:].shape[1] > 1 and kind.form != "candidates"
    refuse(
        (tokens.common >= room) & several,
        lambda i: f"two completions are equal in the {room[i]} tokens that are kept of them {fix}",
    )
    empty = (tokens.blank >= room) & (lengths[:, 1:] > 0).any(axis=1)
    refuse(empty, lambda i: f"nothing is left to train on of a completion in the {room[i]} tokens that are kept {fix}")
    numbers = np.asarray(tokens.numbers)
    bad = [BadRow(source.name, int(numbers[i]), why) for i, why in whys.items()]
    rows = np.setdiff1d(np.arange(len(tokens)), list(whys))
    cut = Cut(cut.prompt[rows], cut.completions[rows])
    return Judged(
        rows,
        cut,
        np.asarray(cut.prompt < lengths[rows, 0]),
        np.asarray((cut.completions < lengths[rows, 1:]).any(axis=1)),
        sorted([*source.tokens.bad, *bad], key=lambda row: row.number),
    )


def remarks_on(sources: Sequence[SourceTokens]) -> list[str]:
    """What is to be said of sources, each thing once, with the sources that it is true of."""
    said: dict[str, list[str]] = {}
    for source in sources:
        tokens = source.tokens
        if tokens.format:
            said.setdefault(f"read as {tokens.format}", []).append(source.name)
        if tokens.unread:
            are = "columns" if len(tokens.unread) > 1 else "column"
            said.setdefault(f"not used: {are} {_columns(tokens.unread)}", []).append(source.name)
        if tokens.spelled:
            spelled = " ".join(tokens.spelled[:SHOWN]) + (" ..." if len(tokens.spelled) > SHOWN else "")
            how = "are those tokens, by --allow-special-tokens" if tokens.special else "are text, not those tokens"
            said.setdefault(f"special tokens spelled in rows ({spelled}) {how}", []).append(source.name)
        if tokens.added_eos:
            why = "the chat template ends a reply without a special token, and EOS was added"
            said.setdefault(why, []).append(source.name)
    return [f"{named(names)}: {what}" for what, names in said.items()]


def report_on(read: Sequence[SourceTokens], every: Sequence[Judged]) -> Report:
    """What became of the rows of sources that have been judged."""
    return Report(
        rows=sum(source.tokens.rows for source in read),
        cached=sum(source.tokens.rows for source in read if source.cached),
        filtered=sum(source.tokens.filtered for source in read),
        dropped=[bad for one in every for bad in one.bad],
        prompts_cut=sum(int(one.prompts_cut.sum()) for one in every),
        completions_cut=sum(int(one.completions_cut.sum()) for one in every),
        remarks=remarks_on(read),
        beside=read[0].beside,
    )


def _columns(names: Sequence[str]) -> str:
    """Names of columns, the first of many, each as a console can show it."""
    shown = [name if name.isprintable() and len(name) < LONG else ascii(name)[:LONG] for name in names[:COLUMNS]]
    others = len(names) - COLUMNS
    return ", ".join(shown) + (f" and {others} more" if others > 0 else "")


def named(names: Sequence[str]) -> str:
    """Names of sources, the first of many."""
    others = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {others} more" if others > 0 else "")


def _refuse(bad: Sequence[BadRow], skip_bad_rows: bool | None) -> None:
    if bad and not skip_bad_rows:
        others = len(bad) - 1
        more = f" ({others} more bad row{'s' * (others > 1)})" if others else ""
        choice = "" if skip_bad_rows is None else ", or pass --skip-bad-rows"
        raise UserError(f"{bad[0]}{more}; fix it{choice}")


def _are_names(sources: Sequence[Any]) -> TypeGuard[Sequence[str]]:
    return bool(sources) and all(isinstance(source, str) for source in sources)


def read_tokens(
    sources: str | Sequence[str] | Sequence[Mapping[str, Any]],
    encoder: Encoder,
    reading: Reading,
    *,
    workers: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[SourceTokens], list[int]]:
    """The tokens of all sources, not cut; and for each, which of the names it is of.

    Raises:
      UserError: a source is missing, unreadable or empty.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if not _are_names(sources):
        return [memory_tokens(sources, reading, encoder)], [0]
    identity = encoder_identity(encoder)
    opened = [(i, source) for i, name in enumerate(sources) for source in open_sources(name)]
    sizes = [source.estimated_rows() for _, source in opened]
    done: list[SourceTokens] = []

    def reach(rows: int) -> None:
        at = len(done)
        progress((sum(sizes[:at]) + min(rows, sizes[at])) / sum(sizes))

    for _, source in opened:
        done.append(source_tokens(source, reading, encoder, identity, workers=workers, progress=reach))
    progress(1.0)
    return done, [i for i, _ in opened]


def load_examples(
    sources: str | Sequence[str] | Sequence[Mapping[str, Any]],
    encoder: Encoder,
    *,
    kind: RowKind = PAIRS,
    max_length: int = 1024,
    min_prompt_length: int = MIN_PROMPT_LENGTH,
    skip_bad_rows: bool | None = False,
    format: str = "auto",
    filters: Sequence[Filter] = (),
    weights: Sequence[float] = (),
    workers: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Examples, Report]:
    """The rows of all sources in tokens, cut to ``max_length``, in order, and a report of what became of them.

    The tokens of a file are kept beside it. A later call with an equal file, tokenizer and form of rows reads them
    back, whatever margins and weights it asks for.

    Args:
      sources: names of sources (:func:`~dpojax.data.sources.open_sources`), or of one; or a list of dicts, rows in
        memory.
      encoder: the tokenizer's.
      kind: the form of the rows, and the annotations that they must have.
      max_length: tokens of prompt + completion.
      min_prompt_length: tokens of the prompt that are kept before a completion is cut
        (:func:`~dpojax.data.examples.cut_to`).
      skip_bad_rows: leave out unusable rows, which the report lists; None where the command has no such option.
      format: that the records were published in: a name, ``path.py:name``, or auto, found by their columns.
      filters: of the records.
      weights: of the sources, by which batches draw from them; without any, every row is drawn once.
      workers: processes that tokenise; with more than one, a script must guard its own beginning
        (``if __name__ == "__main__"``), as others start it again.
      progress: called with the share that is done, from 0 to 1.

    Raises:
      UserError: a source is missing or empty; a row is unusable and ``skip_bad_rows`` is off; no row is left.
    """
    reading = Reading(kind.form, format, tuple(filters))
    read, of = read_tokens(sources, encoder, reading, workers=workers, progress=progress)
    every = [judged(source, kind, max_length, min_prompt_length) for source in read]
    report = report_on(read, every)
    _refuse(report.dropped, skip_bad_rows)
    if report.kept == 0:
        first = f"the first: {report.dropped[0].why}" if report.dropped else "all left out by --filter"
        raise UserError(f"{named([source.name for source in read])}: no row is usable ({first}); see check-data")
    return Examples.of_tokens(
        [source.tokens.tokens for source in read],
        [one.rows for one in every],
        [one.cut for one in every],
        kind,
        part=of,
        weights=weights,
    ), report


def places_cut(source: SourceTokens, one: Judged) -> tuple[list[Place], list[Place]]:
    """Where prompts were cut, and where completions."""
    numbers = np.asarray(source.tokens.tokens.numbers)[one.rows]
    at = lambda flags: [Place(source.name, n) for n in numbers[flags].tolist()]  # noqa: E731
    return at(one.prompts_cut), at(one.completions_cut)
