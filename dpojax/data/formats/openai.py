"""OpenAI's files for fine-tuning: preferences, and conversations.

Source: OpenAI's guides to direct preference optimization and to supervised fine-tuning.
"""

from typing import Any

from dpojax.data.formats.base import Format, Record, first_of, has, lacks, object_of, value_of
from dpojax.data.formats.chat import ended_by_assistant, messages_of, tools_of

OUTPUTS = ("input", "preferred_output", "non_preferred_output")
OTHERS = (
    "prompt",
    "prompt_ids",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "conversations",
    "input",
    "context",
)


def _is_preference(record: Record) -> bool:
    return has(record, *OUTPUTS) and isinstance(record["input"], dict)


def openai(record: dict[str, Any]) -> dict[str, Any]:
    """The pair of a preferred and another output, as chat messages, with the tools of its input."""
    given = object_of(value_of(record, "input"), "input")
    return {
        "prompt": messages_of(given.get("messages"), "input.messages"),
        "chosen": messages_of(value_of(record, "preferred_output"), "preferred_output"),
        "rejected": messages_of(value_of(record, "non_preferred_output"), "non_preferred_output"),
        **tools_of(given.get("tools"), "input.tools"),
    }


def _is_conversation(record: Record) -> bool:
    return has(first_of(record, "messages"), "role") and lacks(record, *OTHERS)


def messages(record: dict[str, Any]) -> dict[str, Any]:
    """A conversation's last message, the assistant's, as the completion of those before it."""
    if record.get("functions"):
        raise ValueError("column 'functions' is the older form of tools; write it as 'tools'")
    conversation = messages_of(value_of(record, "messages"), "messages")
    prompt, reply = ended_by_assistant(conversation, "messages")
    if reply.get("weight") == 0:
        raise ValueError("column 'messages' ends with a message of weight 0, so that none is trained; leave it out")
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in (*prompt, reply)]
    kwargs = {} if lacks(record, KWARGS) else {KWARGS: object_of(record[KWARGS], KWARGS)}
    return {
        "prompt": plain[:-1],
        "completion": plain[-1:],
        **tools_of(record.get("tools"), "tools"),
        **kwargs,
    }


KWARGS = "chat_template_kwargs"
OPENAI = Format("openai", "OpenAI preference fine-tuning", OUTPUTS, _is_preference, openai)
MESSAGES = Format(
    "messages", "OpenAI fine-tuning", ("messages", "tools", "functions", KWARGS), _is_conversation, messages
)
