"""Calls of tools and schemas of tools, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import kind
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message


def read_call(call: Any, where: str) -> dict[str, Any]:
    """One call as ``{"type": "function", "function": {"name", "arguments"}}``, and its ``id`` if it has one.

    Args:
        call: In this form, or ``{"name", "arguments"}`` (or ``parameters``); arguments may be an object's JSON text.
        where: Where it stands, for messages.

    Raises:
        DataError: If it has no name, or its arguments are no object.
    """
    if not isinstance(call, Mapping):
        raise DataError(f"{where}: a call of a tool is {kind(call)}, expected an object with name and arguments")
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the name of a called tool is {kind(name)}, expected a string")
    arguments: Any = next((inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: the arguments of {name} are not valid JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of {name} are {kind(arguments)}, expected an object")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) else read


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Schemas as ``{"type": "function", "function": {"name", "description", "parameters"}}``; None if there are none.

    Args:
        tools: A list of schemas in this form or of the inner objects, or its JSON text; empty text is none.

    Raises:
        DataError: If the text is not JSON, or a schema has no name.
    """
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"tools is text that is not valid JSON: {error}") from error
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        raise DataError(f"tools is {kind(tools)}, expected a list of schemas")
    return [_schema(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def _schema(tool: Any, where: str) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{where} is {kind(tool)} without a name, expected a schema with name and parameters")
    if inner is not tool:
        return dict(tool)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def join_calls(messages: list[Message]) -> list[Message]:
    """Make one turn of an assistant's text and the calls after it, and name the tool of each answer.

    Chat templates expect the calls of a turn together. An answer without a name is that of the call with its
    ``tool_call_id``, or else of the next call that has no answer yet.
    """
    joined: list[Message] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls and joined and joined[-1]["role"] == "assistant":
            joined[-1] = _with_calls(joined[-1], message, calls)
            waiting = waiting + calls
            continue
        if message["role"] == "assistant":
            waiting = list(calls or [])
        elif message["role"] == "tool" and waiting:
            call = _answered(message, waiting)
            waiting.remove(call)
            if not message.get("name"):
                message["name"] = call["function"]["name"]
        joined.append(message)
    return joined


def _with_calls(before: Message, message: Message, calls: list[dict[str, Any]]) -> Message:
    joined: Message = {**before, **message}
    joined["content"] = "\n".join(text for text in (before["content"], message["content"]) if text)
    joined["tool_calls"] = [*before.get("tool_calls", []), *calls]
    return joined


def _answered(answer: Message, waiting: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = answer.get("tool_call_id")
    by_id = (call for call in waiting if wanted is not None and call.get("id") == wanted)
    by_name = (call for call in waiting if call["function"]["name"] == answer.get("name"))
    return next(by_id, None) or next(by_name, None) or waiting[0]
