"""Glaive's dialogues as one text: ``SYSTEM:``, ``USER:``, ``ASSISTANT:`` and ``FUNCTION RESPONSE:`` with calls inside.

Calls read ``<functioncall> {"name": "f", "arguments": '{"a": 1}'}``, with the arguments in single quotes, and the
system text lists the schemas of tools one after the other.

Source:
    glaive-function-calling-v2, whose rows have this text in ``system`` and ``chat``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import Format, Parsed, kind
from moeft.data.formats.tool_calls import join_calls, read_call, read_tools
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message

_ROLES = {"SYSTEM": "system", "USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_HEADER = re.compile(r"(?:^|\n)\s*(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE): ?")
CALL = "<functioncall>"
_QUOTED_ARGUMENTS = re.compile(r'("arguments"\s*:\s*)\'(.*)\'(\s*\}?\s*)$', re.DOTALL)
END = "<|endoftext|>"


def is_dialogue(text: str) -> bool:
    """Whether a text begins with a turn of this form and has an answer."""
    head = text.lstrip()
    return head.startswith(("SYSTEM:", "USER:")) and "ASSISTANT:" in head


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read ``chat``, with ``system`` before it if the row has one.

    Raises:
        DataError: If a value is no text, or a call cannot be read.
    """
    texts = [record.get("system") or "", record.get("chat")]
    for key, text in zip(("system", "chat"), texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{key} is {kind(text)}, expected a string")
    return parse_dialogue("\n".join(map(str, texts)))


def parse_dialogue(text: str) -> Parsed:
    """Read a dialogue that stands in one text.

    Raises:
        DataError: If text stands before the first turn, or a call cannot be read.
    """
    before, *pieces = _HEADER.split(text)
    if before.strip():
        raise DataError(f"text stands before the first turn: {before.strip()[:40]!r}")
    messages: list[Message] = []
    tools: list[Any] = []
    for header, content in zip(pieces[::2], pieces[1::2], strict=True):
        role = _ROLES[header]
        content = content.replace(END, "").strip()
        if role == "system":
            content, tools = _split_schemas(content)
        messages.append(_message(role, content))
    return Parsed(join_calls(messages), read_tools(tools))


def _message(role: str, content: str) -> Message:
    if role != "assistant" or CALL not in content:
        return {"role": role, "content": content}
    said, *calls = content.split(CALL)
    read = [read_call(call_object(call.strip()), "chat") for call in calls]
    return {"role": role, "content": said.strip(), "tool_calls": read}


def call_object(text: str) -> Any:
    """The JSON object of a call, whatever quotes stand around its arguments.

    Raises:
        DataError: If it is none.
    """
    # The quotes around the arguments are not JSON, and what they hold is.
    plain = _QUOTED_ARGUMENTS.sub(lambda match: match[1] + match[2].replace("\\'", "'") + match[3], text)
    try:
        return json.loads(plain)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"a call cannot be read: {text[:80]!r}") from error


def _split_schemas(system: str) -> tuple[str, list[Any]]:
    """The system text before its schemas, and these; a text whose braces are no JSON is left as it is."""
    decoder = json.JSONDecoder()
    schemas: list[Any] = []
    start = position = system.find("{")
    while position >= 0:
        try:
            schema, end = decoder.raw_decode(system, position)
        except (json.JSONDecodeError, RecursionError):
            return system, []
        schemas.append(schema)
        position = system.find("{", end)
    if not schemas or not all(isinstance(schema, dict) and "name" in schema for schema in schemas):
        return system, []
    return system[:start].rstrip(" -\n"), schemas


FORMAT = Format("glaive", (("chat",),), parse)
