"""Stack Exchange: a question and its answers, in pairs or with scores.

Source of the prompt: TRL's StackLLaMA example, "Question: ...\\n\\nAnswer: ". Data sets: lvwerra/stack-exchange-paired
and HuggingFaceH4/stack-exchange-preferences, whose scores are those of Askell et al. 2021 (arXiv:2112.00861).
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, fields_of, first_of, has, number_of, reply_of, text_of


def _is_paired(record: Record) -> bool:
    return has(record, "question", "response_j", "response_k")


def _is_scored(record: Record) -> bool:
    return has(record, "question") and has(first_of(record, "answers"), "text", "pm_score")


def _prompt(record: Record) -> str:
    return f"Question: {text_of(record, 'question')}\n\nAnswer: "


def stack_exchange(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two answers; j is the better one."""
    sides = {"chosen": reply_of(record, "response_j"), "rejected": reply_of(record, "response_k")}
    return {"prompt": _prompt(record), **sides}


def stack_exchange_preferences(record: dict[str, Any]) -> dict[str, Any]:
    """All answers with their scores, the HTML as published."""
    answers = fields_of(record, "answers", "text", reply_of)
    scores = fields_of(record, "answers", "pm_score", number_of)
    return {"prompt": _prompt(record), "completions": answers, "scores": scores}


PAIRED = Format(
    "stack_exchange",
    "Stack Exchange paired (StackLLaMA)",
    ("question", "response_j", "response_k"),
    _is_paired,
    stack_exchange,
)
SCORED = Format(
    "stack_exchange_preferences",
    "H4 Stack Exchange preferences",
    ("question", "answers"),
    _is_scored,
    stack_exchange_preferences,
)
