"""Gemma 4's own calls: ``<|tool_call>call:name{key:value}<tool_call|>``, as its chat template writes them.

Values are as in JSON, but for strings, which stand between ``<|"|>`` and hold no escapes. Keys are bare; one with other
characters than a name has stands between ``<|"|>`` too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol, parse_marked
from moeft.tool_protocols.json_values import read_json, write_json

_OPEN, _CLOSE, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = re.compile(r"\w[\w.\-]*")
_SCALAR = re.compile(r"[-+.A-Za-z0-9]+")
_MOST_DEPTH = 64
_MARKS = re.compile(r"<\|tool_response>|<turn\|>|<eos>")
"""What ends a turn, and is no part of what was said."""


def parse(text: str) -> Reply:
    """Take a reply apart.

    Raises:
        ToolCallError: If a call is begun that is not well-formed.
    """
    reply = parse_marked(text, _OPEN, _call)
    return Reply(_MARKS.sub("", reply.said), reply.calls)


def format_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls one behind the other.

    Raises:
        ValueError: If a name has other characters than letters, digits, ``_``, ``.`` and ``-``, a text holds ``<|"|>``,
            or a value has no JSON form.
    """
    return "".join(map(_written_call, calls))


def _call(text: str, position: int) -> tuple[ToolCall, int]:
    position = _expect(text, position + len(_OPEN), "call:")
    name, position = _name(text, position, "the name of a tool")
    arguments, position = _object(text, _expect(text, position, "{"), 0)
    return ToolCall(name, arguments), _expect(text, position, _CLOSE)


def _object(text: str, position: int, depth: int) -> tuple[dict[str, Any], int]:
    """Read what follows an opening brace."""
    found: dict[str, Any] = {}
    if text.startswith("}", position):
        return found, position + 1
    while True:
        start = position
        if text.startswith(_QUOTE, position):
            key, position = _string(text, position)
        else:
            key, position = _name(text, position, "a key")
        if key in found:
            raise ToolCallError(text, start, f"key {key!r} is given twice")
        found[key], position = _value(text, _expect(text, position, ":"), depth + 1)
        if text.startswith("}", position):
            return found, position + 1
        position = _expect(text, position, ",")


def _list(text: str, position: int, depth: int) -> tuple[list[Any], int]:
    """Read what follows an opening bracket."""
    found: list[Any] = []
    if text.startswith("]", position):
        return found, position + 1
    while True:
        value, position = _value(text, position, depth + 1)
        found.append(value)
        if text.startswith("]", position):
            return found, position + 1
        position = _expect(text, position, ",")


def _value(text: str, position: int, depth: int) -> tuple[Any, int]:
    if depth > _MOST_DEPTH:
        raise ToolCallError(text, position, f"values nested deeper than {_MOST_DEPTH}")
    if text.startswith(_QUOTE, position):
        return _string(text, position)
    if text.startswith("{", position):
        return _object(text, position + 1, depth)
    if text.startswith("[", position):
        return _list(text, position + 1, depth)
    scalar = _SCALAR.match(text, position)
    if scalar is None:
        raise ToolCallError(text, position, "expected a value")
    value, end = read_json(text[: scalar.end()], position)
    if end != scalar.end():
        raise ToolCallError(text, end, "expected the end of a number")
    return value, end


def _string(text: str, position: int) -> tuple[str, int]:
    start = position + len(_QUOTE)
    stop = text.find(_QUOTE, start)
    if stop < 0:
        raise ToolCallError(text, len(text), f"expected {_QUOTE}")
    return text[start:stop], stop + len(_QUOTE)


def _name(text: str, position: int, what: str) -> tuple[str, int]:
    match = _NAME.match(text, position)
    if match is None:
        raise ToolCallError(text, position, f"expected {what}")
    return match[0], match.end()


def _expect(text: str, position: int, wanted: str) -> int:
    if not text.startswith(wanted, position):
        raise ToolCallError(text, position, f"expected {wanted!r}")
    return position + len(wanted)


def _written_call(call: ToolCall) -> str:
    for name in (call.name, *call.arguments):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be written, expected letters, digits, _, . and -")
    inner = ",".join(f"{key}:{_written(call.arguments[key])}" for key in _sorted(call.arguments))
    return f"{_OPEN}call:{call.name}{{{inner}}}{_CLOSE}"


def _written(value: Any) -> str:
    if isinstance(value, str):
        if _QUOTE in value:
            raise ValueError(f"the text {value!r} holds {_QUOTE}, which ends a text")
        return f"{_QUOTE}{value}{_QUOTE}"
    if isinstance(value, dict):
        keys = {key: key if _NAME.fullmatch(key) else _written(key) for key in _sorted(value)}
        return "{" + ",".join(f"{keys[key]}:{_written(value[key])}" for key in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return write_json(value)


def _sorted(keys: Iterable[str]) -> list[str]:
    """Keys in the order of the chat template, which takes capitals for small letters."""
    return sorted(keys, key=str.lower)


PROTOCOL = ToolProtocol("gemma", parse, format_calls)
