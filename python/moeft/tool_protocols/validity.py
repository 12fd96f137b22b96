"""Whether a reply could be carried out: calls that can be read, of tools that exist, with fitting arguments."""

from __future__ import annotations

from moeft.data.tool_schemas import ToolSchemas
from moeft.tool_protocols.call import ToolCallError, ToolProtocol


def problem_of_reply(text: str, protocol: ToolProtocol, schemas: ToolSchemas) -> str | None:
    """Why a reply that has to call a tool is invalid, or None.

    Args:
        text: The whole reply.
        protocol: How calls are written.
        schemas: The tools on offer.

    Returns:
        The first reason: no call, one that is not well-formed, of a tool that is not offered, or against its schema.
    """
    try:
        calls = protocol.parse(text).calls
    except ToolCallError as error:
        return str(error)
    if not calls:
        return "calls no tool"
    for call in calls:
        if problem := schemas.problem(call.name, protocol.typed(call, schemas).arguments):
            return problem
    return None
