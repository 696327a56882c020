"""Which rows of a file a run would truncate or refuse, and why, before the run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpojax.data.cache import refused
from dpojax.data.encode import Encoder, render_rows, tokenize_rows
from dpojax.data.load import Report, truncate_rows
from dpojax.data.read import rows_of
from dpojax.data.rows import RowKind
from dpojax.data.sources import open_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_files(
    files: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None", kind: RowKind, max_length: int
) -> tuple[list[str], bool]:
    """A line for every row that would be dropped or truncated, then a summary; and whether any would be dropped.

    Args:
      files: names of sources (:func:`~dpojax.data.sources.open_sources`).
      tokenizer: finds over-long rows too; None checks the fields alone.
      kind: the form of the rows, and the annotations that they must have.
      max_length: tokens of prompt + completion.

    Raises:
      UserError: a file is missing, unreadable or empty.
    """
    report = Report()
    encoder = Encoder(tokenizer) if tokenizer else None
    for source in [source for file in files for source in open_sources(file)]:
        rendered, bad = render_rows(rows_of(source), kind.form, encoder)
        report.rows += len(rendered) + len(bad)
        lacking = refused(rendered, kind, source.name)
        bad += lacking
        if encoder:
            numbers = {row.number for row in lacking}
            usable = [row for row in rendered if row.number not in numbers]
            tokenized, not_encoded = tokenize_rows(usable, encoder, source.name)
            bad += not_encoded
            truncate_rows(tokenized, source.name, kind, max_length, report)
        report.dropped += sorted(bad, key=lambda row: row.number)
    lines = [f"dropped: {bad}" for bad in report.dropped]
    lines += [f"truncated: {place}: prompt cut at its start" for place in report.prompts_cut]
    lines += [f"truncated: {place}: completion cut at its end" for place in report.completions_cut]
    kept = report.rows - len(report.dropped)
    cut = f"{len({*report.prompts_cut, *report.completions_cut})} of them truncated to {max_length} tokens"
    if encoder is None:
        cut = "lengths not looked at (give --model)"
    lines.append(f"{report.rows} rows: {kept} kept, {cut}, {len(report.dropped)} dropped")
    return lines, bool(report.dropped)
