"""NVIDIA's HelpSteer: responses with attributes, one a record, and preferences between two responses.

Source: Wang et al. 2023 (arXiv:2311.09528), 2024 (arXiv:2406.08673, 2410.01257) and 2025 (arXiv:2505.11475), the data
sets nvidia/HelpSteer, nvidia/HelpSteer2 and nvidia/HelpSteer3 (preference).
"""

import re
from typing import Any

from dpojax.data.formats.base import (
    Format,
    Record,
    choice_of,
    has,
    items_of,
    lacks,
    never,
    number_of,
    object_of,
    reply_of,
    text_of,
    value_of,
)
from dpojax.data.formats.chat import assistant, messages_of, user

READS = ("prompt", "response", "helpfulness")
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
STRENGTHS = range(-3, 4)


def _matches(record: Record) -> bool:
    return has(record, *READS)


def helpsteer(record: dict[str, Any]) -> dict[str, Any]:
    """The responses to one prompt, scored by their helpfulness; of a single response, a completion."""
    records = items_of(record, "records") if "records" in record else [record]
    given = [object_of(one, f"records[{i}]") for i, one in enumerate(records)]
    prompt = text_of(given[0], "prompt")
    responses = [reply_of(one, "response") for one in given]
    scores = [number_of(one, "helpfulness") for one in given]
    if len(responses) == 1:
        return {"prompt": prompt, "completion": responses[0]}
    return {"prompt": prompt, "completions": responses, "scores": scores}


def _turns(prompt: str) -> list[dict[str, Any]]:
    """A prompt's turns: it begins with the user's, and each later one follows its marker."""
    first, *rest = TURN.split(prompt)
    messages = [user(first)]
    for who, said in zip(rest[::2], rest[1::2], strict=True):
        messages.append(user(said) if who == "User" else assistant(said))
    return messages


def helpsteer_chat(record: dict[str, Any]) -> dict[str, Any]:
    """The responses to one prompt, scored by their helpfulness, as chat messages."""
    row = helpsteer(record)
    row["prompt"] = _turns(row["prompt"])
    if "completion" in row:
        row["completion"] = [assistant(row["completion"])]
    else:
        row["completions"] = [[assistant(text)] for text in row["completions"]]
    return row


def _preferred(record: Record, first: str, second: str, strength: str) -> dict[str, Any]:
    """The pair of two responses; below zero the first is better, and the margin is the strength."""
    value = choice_of(record, strength, STRENGTHS, "it must be a whole number from -3 (the first is better) to 3")
    if value == 0:
        raise ValueError(f"column {strength!r} is 0, so that neither response is better; leave the record out")
    better, worse = (first, second) if value < 0 else (second, first)
    chosen, rejected = reply_of(record, better), reply_of(record, worse)
    return {"chosen": chosen, "rejected": rejected, "margin": float(abs(value))}


def helpsteer2_preference(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two responses with its margin, as text."""
    pair = _preferred(record, "response_1", "response_2", "preference_strength")
    return {"prompt": text_of(record, "prompt"), **pair}


def helpsteer3(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two responses to a conversation with its margin, as a chat."""
    context = messages_of(value_of(record, "context"), "context")
    return {"prompt": context, **_preferred(record, "response1", "response2", "overall_preference")}


def _is_2(record: Record) -> bool:
    return has(record, *READS_2) and lacks(record, "chosen", "rejected")


def _is_3(record: Record) -> bool:
    return has(record, *READS_3)


READS_2 = ("prompt", "response_1", "response_2", "preference_strength")
READS_3 = ("context", "response1", "response2", "overall_preference")
HELPSTEER = Format("helpsteer", "NVIDIA HelpSteer, HelpSteer2", READS, _matches, helpsteer, group="prompt")
HELPSTEER_CHAT = Format(
    "helpsteer_chat", "NVIDIA HelpSteer, HelpSteer2, as chat", READS, never, helpsteer_chat, group="prompt"
)
HELPSTEER2 = Format("helpsteer2_preference", "NVIDIA HelpSteer2 preference", READS_2, _is_2, helpsteer2_preference)
HELPSTEER3 = Format("helpsteer3", "NVIDIA HelpSteer3 preference", READS_3, _is_3, helpsteer3)
