"""Chat messages and tools as others write them -> as chat templates take them."""

import json
from typing import Any

from dpojax.data.formats.base import a, object_of, shown


def assistant(content: str) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def user(content: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def from_json(value: str, where: str) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: it is no JSON.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"column {where!r} is text that is no JSON ({shown(value)}); fix it") from None


def function_call(value: Any, where: str) -> dict[str, Any]:
    """A call of a tool: its name, and its arguments as an object, which templates write as JSON themselves.

    Raises:
      ValueError: it has no name, or its arguments are no object.
    """
    function = object_of(value, where)
    if not isinstance(function.get("name"), str):
        raise ValueError(f"column {where!r} has no name; a call of a tool has a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{where}.arguments") if arguments.strip() else {}
    arguments = object_of({} if arguments is None else arguments, f"{where}.arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"column {where!r} is {a(value)}; it must be a list of calls")
    calls = []
    for i, item in enumerate(value):
        call = object_of(item, f"{where}[{i}]")
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append(identity | function_call(call.get("function"), f"{where}[{i}].function"))
    return calls


def message_of(value: Any, where: str) -> dict[str, Any]:
    """A message in OpenAI's form: role and content, and the calls of tools with their arguments as objects.

    Fields that are null are left out; a table has them in every message where one message has them.

    Raises:
      ValueError: it is no message.
    """
    message = {name: field for name, field in object_of(value, where).items() if field is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"column {where!r} has no role; a message has role and content")
    if message.get("function_call") is not None:
        raise ValueError(
            f"column {where!r} has a function_call, the older form of a tool's call; write it as tool_calls"
        )
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
        message.setdefault("content", "")
    content = message.get("content")
    if not isinstance(content, str | list):
        where = f"{where}.content"
        raise ValueError(f"column {where!r} is {a(content)}; it must be text, or a list of parts")
    return message


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages in OpenAI's form.

    Raises:
      ValueError: it is no list, is empty, or one of it is no message.
    """
    if not isinstance(value, list) or not value:
        shape = "an empty list" if value == [] else a(value)
        raise ValueError(f"column {where!r} is {shape}; it must be a list of at least one chat message")
    return [message_of(item, f"{where}[{i}]") for i, item in enumerate(value)]


def tools_of(value: Any, where: str) -> dict[str, Any]:
    """The field ``tools``, of a list or its JSON text; no field where there are none.

    Raises:
      ValueError: it is no list of objects.
    """
    if isinstance(value, str) and value.strip():
        value = from_json(value, where)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, list):
        raise ValueError(f"column {where!r} is {a(value)}; it must be a list of tools, or its JSON text")
    tools = [object_of(tool, f"{where}[{i}]") for i, tool in enumerate(value)]
    return {"tools": [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]}


def system_of(value: Any, where: str) -> dict[str, str]:
    """The field ``system``; no field where the text is null or blank.

    Raises:
      ValueError: it is no text.
    """
    if value is None:
        return {}
    if not isinstance(value, str):
        raise ValueError(f"column {where!r} is {a(value)}; it must be text")
    return {"system": value} if value.strip() else {}


def ended_by_assistant(messages: list[dict[str, Any]], where: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages before the last one, and the last one, which is the assistant's.

    Raises:
      ValueError: the last message is another's, or none comes before it.
    """
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"column {where!r} ends with a message of {shown(messages[-1]['role'])}; end it with the assistant's"
        )
    if len(messages) < 2:
        raise ValueError(f"column {where!r} is the assistant's message alone; begin it with the prompt")
    return messages[:-1], messages[-1]
