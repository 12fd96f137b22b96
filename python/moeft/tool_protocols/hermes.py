"""Calls as Hermes and Qwen write them: ``<tool_call>``, a JSON object with name and arguments, ``</tool_call>``."""

from __future__ import annotations

from collections.abc import Sequence

from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol, parse_marked
from moeft.tool_protocols.json_values import behind_space, read_json, write_json
from moeft.tool_protocols.openai import as_call

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def parse(text: str) -> Reply:
    """Take a reply apart.

    Raises:
        ToolCallError: If a call is begun that is not well-formed.
    """
    return parse_marked(text, _OPEN, _call)


def format_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls one below the other.

    Raises:
        ValueError: If a value has no JSON form.
    """
    return "\n".join(
        f"{_OPEN}\n{write_json({'name': call.name, 'arguments': dict(call.arguments)})}\n{_CLOSE}" for call in calls
    )


def _call(text: str, position: int) -> tuple[ToolCall, int]:
    start = behind_space(text, position + len(_OPEN))
    value, end = read_json(text, start)
    end = behind_space(text, end)
    if not text.startswith(_CLOSE, end):
        raise ToolCallError(text, end, f"expected {_CLOSE}")
    return as_call(value, text, start), end + len(_CLOSE)


PROTOCOL = ToolProtocol("hermes", parse, format_calls)
