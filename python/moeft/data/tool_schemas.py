"""Schemas of tools, and whether a call could be carried out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from moeft.data.formats.tool_calls import read_tools
from moeft.errors import DataError, MissingExtraError

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
_SPOKEN = ("integer", "number", "boolean")


class ToolSchemas:
    """The tools that an assistant may call.

    Args:
        tools: Schemas as OpenAI writes them, or their inner objects, or the JSON text of these.

    Attributes:
        tools: The schemas in OpenAI's form.

    Raises:
        DataError: If there is none, one has no name, or two have the same.
        MissingExtraError: If jsonschema is not installed.
    """

    def __init__(self, tools: Any) -> None:
        self.tools = read_tools(tools) or []
        if not self.tools:
            raise DataError("there are no tools, expected at least one schema with name and parameters")
        self._parameters: dict[str, dict[str, Any]] = {}
        for index, tool in enumerate(self.tools):
            name = tool["function"]["name"]
            if name in self._parameters:
                first = list(self._parameters).index(name)
                raise DataError(f"tools[{index}] is named {name!r}, and so is tools[{first}]; names must differ")
            parameters = tool["function"].get("parameters") or {}
            if not isinstance(parameters, Mapping):
                raise DataError(f"tools[{index}].parameters is no object; expected a JSON schema")
            self._parameters[name] = in_json_schema(dict(parameters))
        self._problem = argument_checker("checking calls of tools")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Schemas of a JSON file.

        Raises:
            DataError: If the file holds none that can be used, with its name.
            OSError: If it cannot be read.
        """
        try:
            return cls(path.read_text("utf-8"))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tools, in their order."""
        return tuple(self._parameters)

    def properties(self, name: str) -> dict[str, Any]:
        """Schemas of a tool's parameters, by name."""
        properties = self._parameters[name].get("properties")
        listed = properties if isinstance(properties, Mapping) else {}
        return {name: schema if isinstance(schema, Mapping) else {} for name, schema in listed.items()}

    def required(self, name: str) -> tuple[str, ...]:
        """Parameters that a call of the tool must have."""
        required = self._parameters[name].get("required")
        return tuple(required) if isinstance(required, list) else ()

    def choices(self, name: str, key: str) -> list[Any]:
        """Values that a parameter is restricted to; empty if it is not."""
        choices = self.properties(name).get(key, {}).get("enum")
        return list(choices) if isinstance(choices, list) else []

    def problem(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """Why a call could not be carried out, or None. An argument that the schema does not have is one reason."""
        if name not in self._parameters:
            return f"calls {name!r}, which is no tool (offered: {', '.join(self.names)})"
        properties = self.properties(name)
        open_ended = self._parameters[name].get("additionalProperties", not properties)
        if not open_ended and (unknown := [key for key in arguments if key not in properties]):
            return f"calls {name!r} with {unknown[0]!r}, which is no parameter of it"
        if problem := self._problem(dict(arguments), self._parameters[name]):
            return f"calls {name!r} with arguments against its schema: {problem}"
        return None

    def typed(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with texts turned into the numbers and booleans that the schema wants, where they spell them."""
        properties = self.properties(name) if name in self._parameters else {}
        return {key: _typed(value, properties.get(key)) for key, value in arguments.items()}


def argument_checker(user: str) -> Callable[[dict[str, Any], Any], str | None]:
    """What says why arguments break a schema; None if they do not.

    Raises:
        MissingExtraError: If jsonschema is not installed.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise MissingExtraError(f"{user} needs jsonschema; pip install 'moeft[data]'") from error

    def problem(arguments: dict[str, Any], schema: Any) -> str | None:
        validator = jsonschema.Draft202012Validator(in_json_schema(schema))
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
        except (jsonschema.exceptions.UnknownType, jsonschema.exceptions.SchemaError, TypeError) as broken:
            return f"the schema itself is broken ({type(broken).__name__})"
        return None if error is None else _shortened(error.message)

    return problem


def _shortened(message: str) -> str:
    """The value stands first in such a message, and what is wrong with it last."""
    return message if len(message) <= 200 else f"{message[:90]} ... {message[-90:]}"


def _typed(value: Any, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if not isinstance(value, str) or kind not in _SPOKEN:
        return value
    try:
        spoken = json.loads(value)
    except (ValueError, RecursionError):
        return value
    # Python reads NaN, Infinity and 1e999 too, which are no JSON numbers.
    is_number = type(spoken) is int or (type(spoken) is float and math.isfinite(spoken))
    return spoken if (isinstance(spoken, bool) if kind == "boolean" else is_number) else value


def in_json_schema(schema: Any) -> Any:
    """A schema with JSON Schema's names of types; ``any`` and a property's ``required: true`` are left out."""
    if isinstance(schema, list):
        return [in_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    read = {key: in_json_schema(value) for key, value in schema.items()}
    if isinstance(read.get("type"), str):
        read["type"] = PYTHON_TYPES.get(read["type"], read["type"])
        if read["type"] == "any":
            del read["type"]
    if isinstance(read.get("required"), bool):
        del read["required"]
    return read
