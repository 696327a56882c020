"""Nectar: a prompt in Anthropic's form and several ranked answers.

Source: Zhu et al. 2023 (Starling-7B), the data set berkeley-nest/Nectar.
"""

from typing import Any

from dpojax.data.formats.base import (
    Format,
    Record,
    fields_of,
    first_of,
    has,
    lacks,
    never,
    number_of,
    reply_of,
    text_of,
)
from dpojax.data.formats.chat import assistant
from dpojax.data.formats.hh import turns_of

READS = ("prompt", "answers")


def _matches(record: Record) -> bool:
    ranked = has(first_of(record, "answers"), "answer", "rank")
    return has(record, "prompt") and lacks(record, "question") and ranked


def nectar(record: dict[str, Any]) -> dict[str, Any]:
    """The ranked completions, as text; a score is the rank's negative.

    The blank after the published prompt's "Assistant: " begins the completions, as in Anthropic's dialogues: a prompt
    that ends with a blank is tokenised unlike any text that a model was trained on.
    """
    prompt = text_of(record, "prompt")
    answers = fields_of(record, "answers", "answer", reply_of)
    if prompt.endswith("\n\nAssistant: "):
        prompt, answers = prompt[:-1], [f" {answer.strip()}" for answer in answers]
    ranks = fields_of(record, "answers", "rank", number_of)
    return {"prompt": prompt, "completions": answers, "scores": [-rank for rank in ranks]}


def nectar_chat(record: dict[str, Any]) -> dict[str, Any]:
    """The ranked completions, as chat messages."""
    row = nectar(record)
    completions = [[assistant(answer.strip())] for answer in row["completions"]]
    return {"prompt": turns_of(row["prompt"], "prompt"), "completions": completions, "scores": row["scores"]}


NECTAR = Format("nectar", "Berkeley Nectar", READS, _matches, nectar)
NECTAR_CHAT = Format("nectar_chat", "Berkeley Nectar, as chat", READS, never, nectar_chat)
