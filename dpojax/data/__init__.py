"""Preference data: files -> rows -> tokens -> batches."""

from dpojax.data.batches import Batches, IndexedBatch, collate, completion_lengths, without_tokens
from dpojax.data.rows import BadRow, Row, Values, completion_of, pair_of, read_rows
from dpojax.data.tokens import Encoder, Example, Report, fingerprint, load_examples, truncate, with_mismatched

__all__ = [
    "BadRow",
    "Batches",
    "Encoder",
    "Example",
    "IndexedBatch",
    "Report",
    "Row",
    "Values",
    "collate",
    "completion_lengths",
    "completion_of",
    "fingerprint",
    "load_examples",
    "pair_of",
    "read_rows",
    "truncate",
    "with_mismatched",
    "without_tokens",
]
