"""A list of turns, each an object, into messages: roles, content parts, calls, and which turns are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import kind
from moeft.data.formats.tool_calls import join_calls, read_call
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message

OPENAI_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "function": "tool",
    "model": "assistant",
}
"""``role`` -> role of the normal form."""

REASONING_PARTS = ("reasoning", "thinking")
"""Types of content parts that hold what an assistant thought."""


def read_turns(
    turns: Any,
    key: str,
    roles: Mapping[str, str] = OPENAI_ROLES,
    role_key: str = "role",
    content_key: str = "content",
    call_roles: tuple[str, ...] = (),
) -> list[Message]:
    """Read a list of turns.

    Args:
        turns: The list, or its JSON text, as a table of plain columns holds it.
        key: Where it stands in the row, for messages.
        roles: Roles as the format writes them -> roles of the normal form.
        role_key: Key of a turn's role.
        content_key: Key of a turn's content.
        call_roles: Roles of assistant turns whose content is a call of a tool.

    Raises:
        DataError: If a turn is not what it should be; the message names it as ``key[index]``.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _parsed_json(turns, key)
    if not isinstance(turns, list):
        raise DataError(f"{key} is {kind(turns)}, expected a list")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} is {kind(turn)}, expected an object")
        name = turn.get(role_key)
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(f"{where}.{role_key} is {name!r}, expected one of {', '.join(roles)}")
        messages.append(_message(turn, role, name in call_roles, content_key, where))
    return join_calls(messages)


def _message(turn: Mapping[str, Any], role: str, is_call: bool, content_key: str, where: str) -> Message:
    content = turn.get(content_key)
    at = f"{where}.{content_key}"
    message: Message = {"role": role, "content": content if isinstance(content, str) else ""}
    calls: list[dict[str, Any]] = []
    if is_call:
        message["content"] = ""
        calls += _calls(content, at)
    elif isinstance(content, list):
        _read_parts(content, message, calls, at)
    elif role == "tool" and isinstance(content, Mapping):
        message["content"] = json.dumps(content, ensure_ascii=False)
    if role == "assistant":
        _read_assistant(turn, message, calls, where)
    elif role == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
    if calls:
        message["tool_calls"] = calls
    has_text = isinstance(content, str | list) or (role == "tool" and isinstance(content, Mapping))
    if not (has_text or calls or message.get("reasoning_content")):
        raise DataError(f"{at} is {kind(content)}, expected a string")
    _read_train(turn, message, where)
    return message


def _read_assistant(turn: Mapping[str, Any], message: Message, calls: list[dict[str, Any]], where: str) -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(turn.get(key), str) and turn[key]:
            message["reasoning_content"] = turn[key]
            break
    if turn.get("tool_calls"):
        calls += _calls(turn["tool_calls"], f"{where}.tool_calls")
    if turn.get("function_call"):  # OpenAI's form before tool_calls.
        calls += _calls(turn["function_call"], f"{where}.function_call")


def _read_parts(parts: list[Any], message: Message, calls: list[dict[str, Any]], at: str) -> None:
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        where = f"{at}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"{where} is {kind(part)}, expected an object with type and text")
        type_ = part.get("type")
        value = next((part[key] for key in ("text", "value", type_) if part.get(key) is not None), None)
        if type_ == "tool_call" and message["role"] == "assistant":
            calls += _calls(value, where)
        elif not isinstance(value, str) or type_ not in ("text", *REASONING_PARTS):
            raise DataError(f"{where} is of type {type_!r}, expected text; pictures and sound are not read")
        else:
            (texts if type_ == "text" else thoughts).append(value)
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _parsed_json(value, where)
    return [read_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _read_train(turn: Mapping[str, Any], message: Message, where: str) -> None:
    """``train`` as true or false, or OpenAI's ``weight`` as 1 or 0."""
    for key in ("train", "weight"):
        flag = turn.get(key)
        if flag is None:
            continue
        if flag not in (0, 1):
            raise DataError(f"{where}.{key} is {flag!r}, expected true or false, or 1 or 0")
        if message["role"] == "assistant":
            message["train"] = bool(flag)
        elif flag and key == "train":
            raise DataError(f"{where}.train is true for a turn of role {message['role']}; only assistants are trained")


def _parsed_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is text that is not valid JSON: {error}") from error
