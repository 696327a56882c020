"""Preference data: files, or rows in memory -> rows -> tokens -> batches."""

import importlib
from typing import TYPE_CHECKING, Any

from dpojax.data.dialogue import (
    CANDIDATES,
    COMPLETIONS,
    LABELS,
    PAIRS,
    PROMPTS,
    Dialogue,
    RowAnnotations,
    RowKind,
    kind_of,
)
from dpojax.data.encode import Encoder, EncodingOptions
from dpojax.data.examples import Example, Examples, truncate
from dpojax.data.filters import parse_filter
from dpojax.data.load import Report, load_examples
from dpojax.data.mismatched import with_mismatched
from dpojax.data.preferences import Preferences, draw_preferences, pairs_of
from dpojax.data.read import BadRow, Row, read_rows
from dpojax.data.rows import completion_of, pair_of

if TYPE_CHECKING:
    from dpojax.data.batches import Batches, IndexedBatch, collate, lengths_only

__all__ = [
    "CANDIDATES",
    "COMPLETIONS",
    "LABELS",
    "PAIRS",
    "PROMPTS",
    "BadRow",
    "Batches",
    "Dialogue",
    "Encoder",
    "EncodingOptions",
    "Example",
    "Examples",
    "IndexedBatch",
    "Preferences",
    "Report",
    "Row",
    "RowAnnotations",
    "RowKind",
    "collate",
    "completion_of",
    "draw_preferences",
    "kind_of",
    "lengths_only",
    "load_examples",
    "pair_of",
    "pairs_of",
    "parse_filter",
    "read_rows",
    "truncate",
    "with_mismatched",
]


_OF_BATCHES = ("Batches", "IndexedBatch", "collate", "lengths_only")


def __getattr__(name: str) -> Any:
    """What needs JAX, imported when it is asked for: processes that tokenise never do."""
    if name not in _OF_BATCHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("dpojax.data.batches"), name)
