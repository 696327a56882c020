"""Which rows of a file a run would truncate or refuse, and why, before the run."""

from collections.abc import Sequence

import numpy as np

from dpojax.data.cache import SourceTokens
from dpojax.data.dialogue import RowKind
from dpojax.data.encode import Encoder
from dpojax.data.load import judged, places_cut, read_tokens, report_on
from dpojax.data.prepare import Reading, check_source
from dpojax.data.sources import open_sources


def check_files(
    files: Sequence[str],
    encoder: Encoder | None,
    kind: RowKind,
    max_length: int,
    min_prompt_length: int,
    reading: Reading,
    workers: int = 1,
) -> tuple[list[str], bool]:
    """A line for every row that would be dropped or truncated, then a summary; and whether any would be dropped.

    Args:
      files: names of sources (:func:`~dpojax.data.sources.open_sources`).
      encoder: finds over-long rows too; None checks the fields alone.
      kind: the form of the rows, and the annotations that they must have.
      max_length, min_prompt_length: as of :func:`~dpojax.data.load.load_examples`.
      reading: how records become rows.
      workers: processes that tokenise.

    Raises:
      UserError: a file is missing, unreadable or empty.
    """
    if encoder is None:
        sources = [source for name in files for source in open_sources(name)]
        read = [SourceTokens(source.name, check_source(source, reading)) for source in sources]
    else:
        read, _ = read_tokens(files, encoder, reading, workers=workers)
    every = [judged(source, kind, max_length, min_prompt_length) for source in read]
    report, cut_lines, cut = report_on(read, every), list[str](), 0
    for source, one in zip(read, every, strict=True):
        prompts, completions = places_cut(source, one)
        cut_lines += [f"truncated: {place}: prompt cut at its start" for place in prompts]
        cut_lines += [f"truncated: {place}: completion cut at its end" for place in completions]
        cut += int(np.count_nonzero(one.prompts_cut | one.completions_cut))
    lines = [f"dropped: {row}" for row in report.dropped]
    lines += sorted(cut_lines, key=lambda line: "completion cut" in line)
    left_out = f"{report.filtered} left out by --filter, " if report.filtered else ""
    said = f"{cut} of them truncated to {max_length} tokens" if encoder else "lengths not looked at (give --model)"
    lines += report.remarks
    lines.append(f"{report.rows} rows: {report.kept} kept, {left_out}{said}, {len(report.dropped)} dropped")
    return lines, bool(report.dropped)
