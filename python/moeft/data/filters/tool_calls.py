"""Rows whose calls of tools could not be carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeft.data.tool_schemas import argument_checker

if TYPE_CHECKING:
    from moeft.data.rows import Row


class ToolCallsFilter:
    """Leaves out rows with a call of a tool that the row does not offer, or with arguments against its schema.

    Raises:
        MissingExtraError: If jsonschema is not installed.
    """

    name = "tool_calls"

    def __init__(self) -> None:
        self._problem = argument_checker(f"data.filters.{self.name}")

    def reason(self, row: Row, place: str) -> str | None:
        """The first call that is wrong, and how, or None."""
        calls = [call["function"] for message in row.messages for call in message.get("tool_calls", [])]
        if not calls:
            return None
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in row.tools or []}
        for call in calls:
            name = call["name"]
            if name not in schemas:
                offered = ", ".join(schemas) or "none"
                return f"calls {name!r}, which is no tool of the row (offered: {offered})"
            if problem := self._problem(call["arguments"], schemas[name]):
                return f"calls {name!r} with arguments against its schema: {problem}"
        return None
