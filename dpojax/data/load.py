"""Files, or rows in memory -> examples in tokens, and a report of what became of every row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

from dpojax.data.cache import SourceTokens, tokenizer_identity
from dpojax.data.encode import Encoder, Example, TokenizedRow, truncate
from dpojax.data.read import BadRow, Place
from dpojax.data.rows import PAIRS, RowKind
from dpojax.data.sources import open_sources
from dpojax.errors import UserError


@dataclasses.dataclass
class Report:
    """What became of the rows."""

    rows: int = 0
    cached: int = 0
    """Rows whose tokens an earlier run has kept."""
    dropped: list[BadRow] = dataclasses.field(default_factory=list)
    prompts_cut: list[Place] = dataclasses.field(default_factory=list)
    completions_cut: list[Place] = dataclasses.field(default_factory=list)

    def sentence(self) -> str:
        """The report in one line, for the console."""
        kept = self.rows - len(self.dropped)
        cut = f"{len(self.prompts_cut)} prompts and {len(self.completions_cut)} completions cut to fit"
        cached = f" (tokens of {self.cached} rows from the cache)" if self.cached else ""
        if self.cached == self.rows > 0:
            cached = " (tokens from the cache)"
        return f"{self.rows} rows: {kept} kept, {len(self.dropped)} dropped, {cut}{cached}"


def truncate_rows(
    rows: Sequence[TokenizedRow], file: str, kind: RowKind, max_length: int, report: Report
) -> list[Example]:
    """The rows that a run of this kind can use, cut to ``max_length``; the report gets the places of what is cut."""
    examples = []
    for row in rows:
        try:
            annotations = row.notes.of_kind(kind)
        except ValueError:
            continue  # it is among the source's bad rows
        prompt, *completions = row.parts
        example, prompt_cut, completion_cut = truncate(prompt, completions, max_length)
        examples.append(dataclasses.replace(example, annotations=annotations))
        if prompt_cut:
            report.prompts_cut.append(Place(file, row.number))
        if completion_cut:
            report.completions_cut.append(Place(file, row.number))
    return examples


def _refuse(bad: Sequence[BadRow], skip_bad_rows: bool | None) -> None:
    if bad and not skip_bad_rows:
        others = len(bad) - 1
        more = f" ({others} more bad row{'s' * (others > 1)})" if others else ""
        choice = "" if skip_bad_rows is None else ", or pass --skip-bad-rows"
        raise UserError(f"{bad[0]}{more}; fix it{choice}")


def _are_names(sources: Sequence[Any]) -> TypeGuard[Sequence[str]]:
    return bool(sources) and all(isinstance(source, str) for source in sources)


def load_examples(
    sources: str | Sequence[str] | Sequence[Mapping[str, Any]],
    encoder: Encoder,
    *,
    kind: RowKind = PAIRS,
    max_length: int = 1024,
    skip_bad_rows: bool | None = False,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[Example], Report]:
    """The rows of all sources in tokens, cut to ``max_length``, in order, and a report of what became of them.

    The tokens of a file are kept beside it. A later call with an equal file, tokenizer and form of rows reads them
    back, whatever margins and weights it asks for.

    Args:
      sources: names of sources (:func:`~dpojax.data.sources.open_sources`), or of one; or a list of dicts, rows in
        memory.
      encoder: the tokenizer's.
      kind: the form of the rows, and the annotations that they must have.
      max_length: tokens of prompt + completion.
      skip_bad_rows: leave out unusable rows, which the report lists; None where the command has no such option.
      progress: called with the share that is done, from 0 to 1.

    Raises:
      UserError: a source is missing or empty; a row is unusable and ``skip_bad_rows`` is off; no row is left.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if _are_names(sources):
        identity = tokenizer_identity(encoder.tokenizer)
        every = [source for name in sources for source in open_sources(name)]
        opened = [SourceTokens.open(source, kind.form, encoder, identity) for source in every]
    else:
        opened = [SourceTokens.in_memory(sources, kind.form, encoder)]
    _refuse([bad for source in opened for bad in source.bad_rows(kind)], skip_bad_rows)
    waiting = [len(source.rendered) for source in opened]

    def reach(i: int, share: float) -> None:
        progress((sum(waiting[:i]) + share * waiting[i]) / sum(waiting))

    tokens = [source.tokenize(encoder, partial(reach, i)) for i, source in enumerate(opened)]
    progress(1.0)
    report = Report(sum(map(len, opened)), sum(len(source) for source in opened if source.cached))
    report.dropped += [bad for source in opened for bad in source.bad_rows(kind)]
    report.dropped += [bad for kept in tokens for bad in kept.not_encoded]
    _refuse(report.dropped, skip_bad_rows)
    examples = []
    for source, kept in zip(opened, tokens, strict=True):
        examples += truncate_rows(kept.usable, source.name, kind, max_length, report)
    if not examples:
        names = ", ".join(source.name for source in opened)
        raise UserError(f"{names}: no row is usable (the first: {report.dropped[0].why}); see check-data")
    return examples, report
