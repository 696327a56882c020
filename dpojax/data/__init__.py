"""Preference data: files, or rows in memory -> rows -> tokens -> batches."""

from dpojax.data.batches import Batches, IndexedBatch, collate, completion_lengths, lengths_only
from dpojax.data.encode import Encoder, Example, fingerprint, truncate
from dpojax.data.load import Report, load_examples
from dpojax.data.mismatched import with_mismatched
from dpojax.data.read import BadRow, Row, read_rows
from dpojax.data.rows import (
    COMPLETIONS,
    LABELS,
    PAIRS,
    PROMPTS,
    Dialogue,
    RowAnnotations,
    RowKind,
    completion_of,
    kind_of,
    pair_of,
)

__all__ = [
    "COMPLETIONS",
    "LABELS",
    "PAIRS",
    "PROMPTS",
    "BadRow",
    "Batches",
    "Dialogue",
    "Encoder",
    "Example",
    "IndexedBatch",
    "Report",
    "Row",
    "RowAnnotations",
    "RowKind",
    "collate",
    "completion_lengths",
    "completion_of",
    "fingerprint",
    "kind_of",
    "lengths_only",
    "load_examples",
    "pair_of",
    "read_rows",
    "truncate",
    "with_mismatched",
]
