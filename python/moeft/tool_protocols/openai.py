"""Calls as JSON: a reply that is one call, a list of calls, or a message with ``tool_calls`` as in OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moeft.data.formats.tool_calls import read_call
from moeft.errors import DataError
from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol
from moeft.tool_protocols.json_values import behind_space, read_json, write_json

_BEGINS = re.compile(r"\s*(?:\{|\[\s*\{)")


def parse(text: str) -> Reply:
    """Take a reply apart; one that does not begin as an object or a list of objects was said and calls nothing.

    Raises:
        ToolCallError: If it begins so and is not JSON to its end, or has no calls in it.
    """
    if not _BEGINS.match(text):
        return Reply(text, ())
    start = behind_space(text, 0)
    value, end = read_json(text, start)
    if behind_space(text, end) != len(text):
        raise ToolCallError(text, end, "text after the JSON value")
    said = ""
    if isinstance(value, dict) and "tool_calls" in value:
        content = value.get("content")
        said = content if isinstance(content, str) else ""
        value = value["tool_calls"]
    calls = value if isinstance(value, list) else [value]
    return Reply(said, tuple(as_call(call, text, start) for call in calls))


def as_call(value: Any, text: str, position: int) -> ToolCall:
    """A call from its JSON object; errors name the position at which it stands in the text."""
    try:
        function = read_call(value, "a call")["function"]
    except DataError as error:
        raise ToolCallError(text, position, str(error)) from error
    return ToolCall(function["name"], function["arguments"])


def format_calls(calls: Sequence[ToolCall]) -> str:
    """One call as an object, several as a list of objects.

    Raises:
        ValueError: If a value has no JSON form.
    """
    objects = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return write_json(objects[0] if len(objects) == 1 else objects)


def _message(said: str, calls: Sequence[ToolCall]) -> str:
    functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    listed = [{"type": "function", "function": function} for function in functions]
    return write_json({"content": said, "tool_calls": listed})


PROTOCOL = ToolProtocol("openai", parse, format_calls, join=_message)
