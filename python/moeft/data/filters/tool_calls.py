"""Rows whose calls of tools could not be carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.data.filters.filter import missing_extra

if TYPE_CHECKING:
    from moeft.data.rows import Row

PYTHON_TYPES = {
    "dict": "object",
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
}
"""Names of types that tool data sets write in place of JSON Schema's."""


class ToolCallsFilter:
    """Leaves out rows with a call of a tool that the row does not offer, or with arguments against its schema.

    Raises:
        MissingExtraError: If jsonschema is not installed.
    """

    name = "tool_calls"

    def __init__(self) -> None:
        try:
            import jsonschema
        except ImportError as error:
            raise missing_extra(self.name, "jsonschema") from error
        self._jsonschema = jsonschema

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

    def _problem(self, arguments: dict[str, Any], schema: Any) -> str | None:
        validator = self._jsonschema.Draft202012Validator(_in_json_schema(schema))
        try:
            error = self._jsonschema.exceptions.best_match(validator.iter_errors(arguments))
        except (self._jsonschema.exceptions.UnknownType, self._jsonschema.exceptions.SchemaError, TypeError) as broken:
            return f"the schema itself is broken ({type(broken).__name__})"
        return None if error is None else error.message[:200]


def _in_json_schema(schema: Any) -> Any:
    """A schema with JSON Schema's names of types; ``any`` and a property's ``required: true`` are left out."""
    if isinstance(schema, list):
        return [_in_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    read = {key: _in_json_schema(value) for key, value in schema.items()}
    if isinstance(read.get("type"), str):
        read["type"] = PYTHON_TYPES.get(read["type"], read["type"])
        if read["type"] == "any":
            del read["type"]
    if isinstance(read.get("required"), bool):
        del read["required"]
    return read
