"""UltraFeedback: an instruction and four scored completions, and the pairs that others made of it.

Source: Cui et al. 2023 (arXiv:2310.01377), the data set openbmb/UltraFeedback; its pairs are
argilla/ultrafeedback-binarized-preferences and its cleaned form. HuggingFaceH4/ultrafeedback_binarized has our own
names and needs no format.
"""

from typing import Any

from dpojax.data.formats.base import (
    SCORE_NAMES,
    Format,
    Record,
    are_conversations,
    fields_of,
    first_of,
    has,
    has_scores,
    lacks,
    number_of,
    reply_of,
    scores_of,
    scores_where_present,
    text_of,
    value_of,
)

RESPONSES = ("instruction", "chosen_response", "rejected_response")
KEPT = ("prompt", "system", "tools", "chat_template_kwargs", "margin", "weight")
"""Fields of ours that a pair may have besides its sides and scores."""


def _is_scored(record: Record) -> bool:
    responses = has(first_of(record, "completions"), "response")
    return has(record, "instruction") and lacks(record, "prompt") and responses


def ultrafeedback(record: dict[str, Any]) -> dict[str, Any]:
    """All completions with GPT-4's overall scores."""
    completions = fields_of(record, "completions", "response", reply_of)
    scores = fields_of(record, "completions", "overall_score", number_of)
    return {"prompt": text_of(record, "instruction"), "completions": completions, "scores": scores}


def _is_pair(record: Record) -> bool:
    prompted = has(record, "prompt", "chosen", "rejected") or are_conversations(record)
    return (prompted and has_scores(record)) or (has(record, *RESPONSES) and lacks(record, "prompt"))


def ultrafeedback_binarized(record: dict[str, Any]) -> dict[str, Any]:
    """A pair with its ratings, of replies as text or of whole conversations."""
    if not lacks(record, "chosen_response", "rejected_response"):
        return {
            "prompt": text_of(record, "instruction"),
            "chosen": reply_of(record, "chosen_response"),
            "rejected": reply_of(record, "rejected_response"),
            **scores_where_present(record, "chosen_avg_rating", "rejected_avg_rating"),
        }
    sides = {name: value_of(record, name) for name in ("chosen", "rejected")}
    kept = {name: record[name] for name in KEPT if not lacks(record, name)}
    return {**kept, **sides, **scores_of(record)}


ULTRAFEEDBACK = Format("ultrafeedback", "UltraFeedback", ("instruction", "completions"), _is_scored, ultrafeedback)
BINARIZED = Format(
    "ultrafeedback_binarized",
    "pairs with ratings (UltraFeedback, binarized)",
    (
        *RESPONSES,
        *("chosen_avg_rating", "rejected_avg_rating", "chosen", "rejected"),
        *KEPT,
        *SCORE_NAMES,
    ),
    _is_pair,
    ultrafeedback_binarized,
)
