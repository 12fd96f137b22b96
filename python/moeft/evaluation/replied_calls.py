"""The calls of tools in an answer, as the server parsed them or as the model wrote them."""

from __future__ import annotations

from moeft.data.formats.tool_calls import read_call
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.evaluation.request import Answer
from moeft.tool_protocols import PROTOCOLS, ToolCall, ToolCallError
from moeft.tool_protocols import protocol as protocol_of


def replied_calls(answer: Answer, schemas: ToolSchemas, protocol: str | None = None) -> tuple[ToolCall, ...] | None:
    """Calls of an answer; None if one is begun that cannot be read.

    Args:
        answer: With a ``reply``, perhaps with ``tool_calls``.
        schemas: The functions on offer, for the types of values that a protocol writes as texts.
        protocol: How calls are written; None takes the first protocol that finds one.

    Raises:
        ValueError: If there is no such protocol.
    """
    if answer.get("tool_calls"):
        try:
            functions = [read_call(call, "a call")["function"] for call in answer["tool_calls"]]
        except DataError:
            return None
        return tuple(ToolCall(function["name"], function["arguments"]) for function in functions)
    is_broken = False
    for candidate in PROTOCOLS.values() if protocol is None else (protocol_of(protocol),):
        try:
            if calls := candidate.parse(answer["reply"]).calls:
                return tuple(candidate.typed(call, schemas) for call in calls)
        except ToolCallError:
            is_broken = True
    return None if is_broken else ()
