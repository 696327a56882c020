"""Preference data: files -> rows -> tokens -> batches."""

from dpojax.data.batches import Batches, IndexedBatch, collate
from dpojax.data.rows import BadRow, Row, completion_of, pair_of, read_rows
from dpojax.data.tokens import Encoder, Example, Report, fingerprint, load_examples, truncate

__all__ = [
    "BadRow",
    "Batches",
    "Encoder",
    "Example",
    "IndexedBatch",
    "Report",
    "Row",
    "collate",
    "completion_of",
    "fingerprint",
    "load_examples",
    "pair_of",
    "read_rows",
    "truncate",
]
