"""What would become of every row of a file, said before a run finds out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpojax.data.rows import Row, read_rows
from dpojax.data.tokens import Encoder, Report, encode_rows, render_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_files(
    files: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None", kind: str, max_length: int
) -> tuple[list[str], bool]:
    """Lines to read, and whether any row is unusable.

    Args:
      files: JSONL or Parquet files.
      tokenizer: finds over-long rows too; None checks the fields alone.
      kind: as for :func:`~dpojax.data.rows.usable_part`.
      max_length: tokens of prompt + completion.

    Raises:
      UserError: a file is missing, unreadable or empty.
    """
    report = Report()
    encoder = Encoder(tokenizer) if tokenizer else None
    usable = render_rows(read_rows(files), kind, encoder, report)
    if encoder:
        encode_rows(usable, encoder, max_length, report)
    lines = [f"dropped: {bad}" for bad in sorted(report.dropped, key=lambda bad: (files.index(bad.file), bad.number))]
    lines += [f"truncated: {row.file}, row {row.number}: prompt cut at its start" for row in report.prompts_cut]
    lines += [f"truncated: {row.file}, row {row.number}: completion cut at its end" for row in report.completions_cut]
    kept = report.rows - len(report.dropped)
    cut = f"{len(_places(report.prompts_cut + report.completions_cut))} of them truncated to {max_length} tokens"
    if encoder is None:
        cut = "lengths not looked at (give --model)"
    lines.append(f"{report.rows} rows: {kept} kept, {cut}, {len(report.dropped)} dropped")
    return lines, bool(report.dropped)


def _places(rows: Sequence[Row]) -> set[tuple[str, int]]:
    return {(row.file, row.number) for row in rows}
