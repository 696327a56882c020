"""Orca pairs: a system message, a question and two replies.

Source: the data sets Intel/orca_dpo_pairs and argilla/distilabel-intel-orca-dpo-pairs, the latter with ratings.
"""

from typing import Any

from dpojax.data.formats.base import (
    Format,
    Record,
    has,
    items_of,
    lacks,
    number_of,
    reply_of,
    text_of,
)
from dpojax.data.formats.chat import system_of, user

READS = ("system", "question", "input", "chosen", "rejected", "rating", "status")


def _matches(record: Record) -> bool:
    one = has(record, "question") != has(record, "input")
    others = lacks(record, "prompt", "instruction", "conversations", "output")
    return has(record, "system", "rejected") and isinstance(record.get("chosen"), str) and one and others


def _scores(record: Record) -> dict[str, float]:
    """The higher of two ratings is the chosen reply's: the columns were exchanged where it was not."""
    if lacks(record, "rating"):
        return {}
    rating = items_of(record, "rating")
    if len(rating) != 2:
        raise ValueError(f"column 'rating' has {len(rating)} items; it must have two, one a reply")
    low, high = sorted([number_of({"rating": value}, "rating") for value in rating])
    return {"score_chosen": high, "score_rejected": low}


def orca(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two replies, as a chat; a blank system message is none."""
    if record.get("status") == "tie":
        raise ValueError("column 'status' is 'tie', so that neither reply is better; leave the record out")
    question = text_of(record, "input" if "input" in record else "question")
    return {
        **system_of(record.get("system"), "system"),
        "prompt": [user(question)],
        "chosen": reply_of(record, "chosen"),
        "rejected": reply_of(record, "rejected"),
        **_scores(record),
    }


ORCA = Format("orca", "Orca DPO pairs (Intel, Argilla)", READS, _matches, orca)
