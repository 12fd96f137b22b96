"""ShareGPT's form: ``conversations`` with ``from`` and ``value``, as LLaMA-Factory and axolotl extend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import Format, Parsed, kind
from moeft.data.formats.message_list import read_turns
from moeft.data.formats.tool_calls import read_tools
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""``from`` -> role."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles of an assistant's turn whose value is a call, or a list of calls, as JSON."""


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read a row of ``conversations``; a ``system`` key stands for a first turn.

    Raises:
        DataError: If a turn or a schema is wrong.
    """
    turns = read_conversations(record.get("conversations"), "conversations")
    return Parsed(with_system(record.get("system"), turns), read_tools(record.get("tools")))


def read_conversations(turns: Any, key: str) -> list[Message]:
    """Turns of ``from`` and ``value``; those of ``role`` and ``content``, which some files have here, as well."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, Mapping) and "role" in first and "from" not in first:
        return read_turns(turns, key)
    return read_turns(turns, key, SHAREGPT_ROLES, "from", "value", CALL_ROLES)


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """Put a system turn in front, if there is text for one.

    Raises:
        DataError: If it is no text, or the conversation has a system turn of its own.
    """
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(f"system is {kind(system)}, expected a string")
    if messages and messages[0]["role"] == "system":
        raise DataError("the row has a system key and a system turn, expected one of them")
    return [{"role": "system", "content": system}, *messages]


FORMAT = Format("sharegpt", (("conversations",),), parse)
