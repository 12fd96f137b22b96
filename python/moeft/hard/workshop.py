"""What pairs are made of: tools that are like each other, other values for an argument, and how turns are written."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from moeft.data.rows import Message
from moeft.data.tool_schemas import ToolSchemas
from moeft.hard.requests import Request
from moeft.tool_protocols import ToolCall, ToolProtocol
from moeft.tool_protocols.call import equal_values

_NATIVE = ("gemma", "openai")
"""Protocols whose calls in earlier turns are written by the chat template."""
_WORDS = re.compile(r"[A-Za-z][a-z]*|[0-9]+")
Confusion = Mapping[str, Mapping[str, float]]


class Workshop:
    """Materials of one build.

    Args:
        schemas: The tools.
        requests: All requests, whose values are those that people use.
        protocol: How calls are written.
        confusion: Right tool -> tool that was called instead -> how often, from an analysis; empty before the first.
        rng: Source of every choice.
    """

    def __init__(
        self,
        schemas: ToolSchemas,
        requests: Sequence[Request],
        protocol: ToolProtocol,
        confusion: Confusion,
        rng: random.Random,
    ) -> None:
        self.schemas = schemas
        self.requests = requests
        self.protocol = protocol
        self.rng = rng
        self._confusion = confusion
        values: dict[str, dict[str, Any]] = defaultdict(dict)
        for request in requests:
            for call in request.calls:
                for key, value in call.arguments.items():
                    values[key].setdefault(json.dumps(value, sort_keys=True), value)
        self._values = {key: list(known.values()) for key, known in values.items()}

    def called(self, calls: Sequence[ToolCall]) -> Message:
        """An earlier turn of the assistant that calls tools."""
        if self.protocol.name not in _NATIVE:
            return {"role": "assistant", "content": self.protocol.format(calls)}
        functions = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in calls]
        return {"role": "assistant", "content": "", "tool_calls": functions}

    def answered(self, name: str, content: str) -> Message:
        """What a tool answered; a protocol that is text gives it as a turn of the user."""
        if self.protocol.name in _NATIVE:
            return {"role": "tool", "content": content, "name": name}
        return {"role": "user", "content": f"{name}: {content}"}

    def other_tool(self, name: str) -> str | None:
        """A tool to be taken for this one: as often as it was, or the more alike the likelier."""
        others = [other for other in self.schemas.names if other != name]
        if not others:
            return None
        seen = self._confusion.get(name, {})
        weights = [seen.get(other, 0.0) for other in others]
        if not any(weights):
            weights = [0.1 + self._likeness(name, other) for other in others]
        return self.rng.choices(others, weights)[0]

    def other_value(self, tool: str, key: str, value: Any) -> Any:
        """Another value that fits the schema of an argument; None if there is no other."""
        choices = self.schemas.choices(tool, key)
        if not choices and isinstance(value, bool):
            choices = [not value]
        if not choices:
            choices = [known for known in self._values.get(key, ()) if type(known) is type(value)]
            if isinstance(value, int | float) and not isinstance(value, bool):
                choices += [value + 1, value * 10]
            elif isinstance(value, str) and len(value) > 1:
                choices.append(value[:-1])
        others = [choice for choice in choices if not equal_values(choice, value)]
        return self.rng.choice(others) if others else None

    def adapted(self, call: ToolCall, name: str) -> ToolCall | None:
        """A call of another tool that is valid, with the same values where it has a place for them; None if not."""
        arguments = {key: value for key, value in call.arguments.items() if key in self.schemas.properties(name)}
        for key in self.schemas.required(name):
            if key not in arguments:
                value = self._any_value(name, key)
                if value is None:
                    return None
                arguments[key] = value
        found = ToolCall(name, arguments)
        return None if self.schemas.problem(name, arguments) else found

    def sibling(self, request: Request) -> Request | None:
        """Another request for the same tools with other arguments, asked alone."""
        names = [call.name for call in request.calls]
        found = [
            other
            for other in self.requests
            if [call.name for call in other.calls] == names
            and other.calls != request.calls
            and is_single(other)
            and is_single(request)
        ]
        return self.rng.choice(found) if found else None

    def words(self, name: str) -> str:
        """A tool's name in words."""
        return " ".join(_WORDS.findall(name)).lower()

    def description(self, name: str) -> str:
        """What a tool is for."""
        function = next(tool["function"] for tool in self.schemas.tools if tool["function"]["name"] == name)
        return str(function.get("description") or self.words(name)).strip().rstrip(".")

    def _any_value(self, tool: str, key: str) -> Any:
        choices = self.schemas.choices(tool, key) or self._values.get(key)
        if choices:
            return self.rng.choice(choices)
        return {"string": key, "integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}.get(
            str(self.schemas.properties(tool).get(key, {}).get("type"))
        )

    def _likeness(self, one: str, other: str) -> float:
        words = [set(self.words(name).split()) for name in (one, other)]
        keys = [set(self.schemas.properties(name)) for name in (one, other)]
        return sum(len(a & b) / max(len(a | b), 1) for a, b in (words, keys))


def is_single(request: Request) -> bool:
    """Whether a request is one turn of the user, nothing before it."""
    return [message["role"] for message in request.prompt] == ["user"]
