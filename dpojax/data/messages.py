"""Chat messages of a row: checked, and in the one form that chat templates are written for."""

import json
from collections.abc import Mapping
from typing import Any

from dpojax.data.read import name_of

Message = dict[str, Any]

SHOWN = 60  # letters of a value in a sentence

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what the assistant thought, by the names that templates give it."""

FIELDS = ("role", "content", "tool_call_id", "name")
"""Fields of a message that need not be named; of another, it is said whether the chat template reads it."""


def unicode_text(text: str, where: str) -> str:
    """The text.

    Raises:
      ValueError: it holds half of a surrogate pair, which JSON can spell and no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid Unicode (a lone surrogate); fix its escapes") from None
    return text


def messages_of(value: list[Any], field: str) -> list[Message]:
    """The messages of a field, in the form that chat templates read.

    Content is text: parts of kind text are joined, null is the empty text. The arguments of a tool call are an object,
    also where they were written as JSON text. Other fields that are null are left out, as Parquet fills rows with them.

    Raises:
      ValueError: an item is no chat message, or holds what is no text.
    """
    if not value:
        raise ValueError(f"field {field!r} is an empty list; give it at least one chat message")
    return [_message(item, field) for item in value]


def _message(item: Any, field: str) -> Message:
    if not (isinstance(item, Mapping) and isinstance(item.get("role"), str) and item["role"]):
        raise ValueError(f"field {field!r} has an item that is not a chat message with role and content")
    if not all(isinstance(name, str) for name in item):
        raise ValueError(f"field {field!r} has a message with a field whose name is not text; name all by text")
    message: Message = {name: x for name, x in item.items() if x is not None}
    unicode_text(message["role"], f"field {field!r}: a role")
    message["content"] = _content(item.get("content"), field)
    for name in REASONING:
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"field {field!r}: a message's {name} is a {name_of(message[name])}; it must be text")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ValueError(f"field {field!r}: a message's tool_calls is a {name_of(calls)}; it must be a list")
        message["tool_calls"] = [_call(call, field) for call in calls]
        if not calls:
            del message["tool_calls"]  # some templates ask whether it is there
    elif "content" not in item and not any(name in message for name in REASONING):
        raise ValueError(f"field {field!r} has a message without content; give it text, parts of text, or tool_calls")
    return message


def _content(content: Any, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return unicode_text(content, f"field {field!r}")
    if not isinstance(content, list):
        raise ValueError(f"field {field!r} has a message whose content is not text")
    return unicode_text("".join([_part(part, field) for part in content]), f"field {field!r}")


def _part(part: Any, field: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(part, Mapping) and part.get("type", "text") != "text":
        kind = ascii(part["type"])[:SHOWN] if isinstance(part["type"], str) else name_of(part["type"])
        raise ValueError(f"field {field!r} has a part of type {kind}; only parts of type text are read")
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} has a message whose content is not text")
    return text


def _call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise ValueError(f"field {field!r} has a tool call without a function's name; give it name and arguments")
    function = dict(function)
    if isinstance(arguments := function.get("arguments"), str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    if "function" not in call:
        return {"type": "function", "function": function}
    return {**{name: x for name, x in call.items() if x is not None}, "function": function}


def is_blank(messages: list[Message]) -> bool:
    """Whether messages say nothing: no text, no reasoning, no tool call."""
    said = [message.get(name, "") for message in messages for name in ("content", *REASONING)]
    return not any(text.strip() for text in said) and not any("tool_calls" in message for message in messages)


def tools_of(value: Any) -> list[Any] | None:
    """The tools that a row offers, a list of JSON schemas; None where it offers none.

    Raises:
      ValueError: it is no list, nor JSON text of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise ValueError("field 'tools' is text that is not JSON; give it a list of tools") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError(f"field 'tools' is a {name_of(value)}; it must be a list of tools")
    return value


def template_kwargs_of(value: Any) -> dict[str, Any]:
    """A row's own arguments of the chat template.

    Raises:
      ValueError: they are no object with named fields, nor JSON text of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = "text"
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("field 'chat_template_kwargs' must be an object with the template's arguments by name")
    return {name: x for name, x in value.items() if x is not None}
