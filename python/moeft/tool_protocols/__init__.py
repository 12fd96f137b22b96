"""How assistants write calls of tools: one parser and one writer for each protocol, and the check against schemas."""

from moeft.tool_protocols import bracket, gemma, glaive, hermes, openai, python_calls
from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol

__all__ = ["PROTOCOLS", "Reply", "ToolCall", "ToolCallError", "ToolProtocol", "protocol"]

PROTOCOLS: dict[str, ToolProtocol] = {
    module.PROTOCOL.name: module.PROTOCOL for module in (bracket, gemma, openai, glaive, hermes, python_calls)
}
"""By name."""


def protocol(name: str) -> ToolProtocol:
    """The protocol of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"there is no tool protocol {name!r}, expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
