"""ShareGPT's conversations, with the columns that LLaMA-Factory adds for pairs, labels and tools.

Source: LLaMA-Factory's data/README.md (its sharegpt format).
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, a, first_of, has, label_of, lacks, shown, value_of
from dpojax.data.formats.chat import (
    assistant,
    ended_by_assistant,
    from_json,
    function_call,
    system_of,
    tools_of,
)

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "function_call": "assistant",
    "system": "system",
}
MEDIA = ("images", "videos", "audios")
READS = ("conversations", "chosen", "rejected", "kto_tag", "label", "system", "tools", *MEDIA)


def _matches(record: Record) -> bool:
    first = first_of(record, "conversations")
    shaped = has(first, "from", "value") or has(first, "role", "content")
    return shaped and lacks(record, "prompt", "prompt_ids", "completion", "completions")


def _message(value: Any, where: str) -> dict[str, Any]:
    """A turn as a chat message: ``from`` and ``value``, or ``role`` and ``content``."""
    if not isinstance(value, dict):
        raise ValueError(f"column {where!r} is {a(value)}; a turn is an object with from and value")
    who = value.get("from", value.get("role"))
    said = value.get("value", value.get("content"))
    if not isinstance(who, str) or who not in ROLES:
        raise ValueError(f"column {where!r} is from {shown(who)}, which is no role; give one of {', '.join(ROLES)}")
    if who == "function_call":
        calls = from_json(said, where) if isinstance(said, str) else said
        calls = calls if isinstance(calls, list) else [calls]
        made = [function_call(call, f"{where}.value[{i}]") for i, call in enumerate(calls)]
        return {**assistant(""), "tool_calls": made}
    if not isinstance(said, str):
        where = f"{where}.value"
        raise ValueError(f"column {where!r} is {a(said)}; it must be text")
    return {"role": ROLES[who], "content": said}


def _reply(record: Record, column: str) -> list[dict[str, Any]]:
    """The one message of a side, given as a turn or as text."""
    value = value_of(record, column)
    message = assistant(value) if isinstance(value, str) else _message(value, column)
    if message["role"] != "assistant":
        raise ValueError(f"column {column!r} is a turn of {shown(message['role'])}; it must be the assistant's")
    return [message]


def _label(record: Record) -> dict[str, bool]:
    column = "kto_tag" if not lacks(record, "kto_tag") else "label"
    if lacks(record, column):
        return {}
    return {"label": label_of(record, column)}


def sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """A pair of replies to a conversation; or the conversation's last turn as a completion, with its label if any."""
    for column in MEDIA:
        if record.get(column):
            raise ValueError(f"column {column!r} is not empty; only text is read here, so leave the record out")
    turns = value_of(record, "conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column 'conversations' is {shown(turns)}; it must be a list of at least one turn")
    messages = [_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    shared = {
        **system_of(record.get("system"), "system"),
        **tools_of(record.get("tools"), "tools"),
    }
    if not lacks(record, "chosen", "rejected"):
        if messages[-1]["role"] == "assistant":
            raise ValueError("column 'conversations' ends with the assistant's turn; a pair's prompt ends before it")
        return {
            **shared,
            "prompt": messages,
            "chosen": _reply(record, "chosen"),
            "rejected": _reply(record, "rejected"),
        }
    prompt, reply = ended_by_assistant(messages, "conversations")
    return {**shared, "prompt": prompt, "completion": [reply], **_label(record)}


SHAREGPT = Format("sharegpt", "ShareGPT (LLaMA-Factory)", READS, _matches, sharegpt)
