"""Anthropic's dialogues: whole conversations as text, "\\n\\nHuman: ...\\n\\nAssistant: ...".

Source: Bai et al. 2022 (arXiv:2204.05862), the data set Anthropic/hh-rlhf. The prompt ends with the last
"\\n\\nAssistant:" and the completion keeps its leading space, as in Rafailov et al. 2023 (arXiv:2305.18290).
"""

import re
from typing import Any

from dpojax.data.formats.base import Format, Record, has, lacks, never, text_of
from dpojax.data.formats.chat import assistant

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
OTHERS = ("prompt", "prompt_ids", "question", "input", "instruction", "conversations", "messages", "history", "context")


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and (HUMAN in value or ASSISTANT in value)


def _matches(record: Record) -> bool:
    return has(record, "chosen", "rejected") and lacks(record, *OTHERS) and _is_dialogue(record["chosen"])


def _cut(record: Record, column: str) -> tuple[str, str]:
    """A dialogue up to its last "Assistant:", and the turn that follows."""
    text = text_of(record, column)
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise ValueError(f"column {column!r} has no Assistant turn; leave the record out")
    if text.rfind(HUMAN) > at:
        raise ValueError(f"column {column!r} ends with a Human turn; end it with the Assistant's, or leave it out")
    prompt, reply = text[: at + len(ASSISTANT)], text[at + len(ASSISTANT) :]
    if not reply.strip():
        raise ValueError(f"column {column!r} ends with an empty Assistant turn; leave the record out")
    return prompt, reply


def hh(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two dialogues that differ in their last turn, as text."""
    (prompt, chosen), (other, rejected) = _cut(record, "chosen"), _cut(record, "rejected")
    if prompt != other:
        differ = "columns 'chosen' and 'rejected' differ before their last Assistant turn"
        raise ValueError(f"{differ}, so that they have no common prompt; leave the record out")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def turns_of(text: str, column: str) -> list[dict[str, Any]]:
    """A prompt that ends with "Assistant:" as chat messages, without that last turn, which is still to come.

    Raises:
      ValueError: the text does not begin with a turn, or a turn is empty.
    """
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        raise ValueError(f"column {column!r} does not begin with a Human or an Assistant turn; leave the record out")
    if turns[-2] == "Assistant" and not turns[-1].strip():
        turns = turns[:-2]
    messages = [
        {"role": ROLES[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if not messages or any(not message["content"] for message in messages):
        raise ValueError(f"column {column!r} has an empty turn in its prompt; leave the record out")
    return messages


def hh_chat(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of two dialogues that differ in their last turn, as chat messages."""
    row = hh(record)
    sides = {name: [assistant(row[name].strip())] for name in ("chosen", "rejected")}
    return {"prompt": turns_of(row["prompt"], "chosen"), **sides}


HH = Format("hh", "Anthropic HH-RLHF", ("chosen", "rejected"), _matches, hh)
HH_CHAT = Format("hh_chat", "Anthropic HH-RLHF, as chat", ("chosen", "rejected"), never, hh_chat)
