"""Glaive's calls, ``<functioncall> {"name": "f", "arguments": '{"a": 1}'}``, read as in rows of its data set."""

from __future__ import annotations

from collections.abc import Sequence
from json import JSONDecodeError

from moeft.data.formats.glaive import CALL, END, call_object
from moeft.errors import DataError
from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol
from moeft.tool_protocols.json_values import write_json
from moeft.tool_protocols.openai import as_call


def parse(text: str) -> Reply:
    """Take a reply apart: what was said, and the calls behind it.

    Raises:
        ToolCallError: If a call is begun that is not well-formed.
    """
    said, *pieces = text.split(CALL)
    calls: list[ToolCall] = []
    position = len(said)
    for piece in pieces:
        position += len(CALL)
        body = piece.replace(END, "").strip()
        start = min(position + len(piece) - len(piece.lstrip()), len(text))
        try:
            value = call_object(body)
        except DataError as error:
            cause = error.__cause__
            offset = cause.pos if isinstance(cause, JSONDecodeError) else 0
            raise ToolCallError(text, min(start + offset, len(text)), str(error)) from error
        calls.append(as_call(value, text, start))
        position += len(piece)
    return Reply(said.replace(END, ""), tuple(calls))


def format_calls(calls: Sequence[ToolCall]) -> str:
    """Write calls one behind the other.

    Raises:
        ValueError: If a value has no JSON form, or a text holds a mark of the protocol.
    """
    written = [
        f'{{"name": {write_json(call.name)}, "arguments": \'{_quoted(write_json(dict(call.arguments)))}\'}}'
        for call in calls
    ]
    for text in written:
        if CALL in text or END in text:
            raise ValueError(f"{text!r} holds {CALL} or {END}, which the protocol cannot hold")
    return " ".join(f"{CALL} {text}" for text in written)


def _quoted(json: str) -> str:
    # The only place where JSON may hold a quote is inside of a string, where an escape stands for it as well.
    return json.replace("'", "\\u0027")


PROTOCOL = ToolProtocol("glaive", parse, format_calls)
