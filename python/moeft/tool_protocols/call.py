"""A call of a tool, a reply with its calls, and the error of a reply that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError


class ToolCallError(DataError):
    """A text is not what its protocol says."""

    def __init__(self, text: str, position: int, reason: str) -> None:
        super().__init__(text, position, reason)
        self.text = text
        self.position = position
        """Index of the first character that cannot be read, 0-based; the length of the text if it ends too early."""
        self.reason = reason

    def __str__(self) -> str:
        found = repr(self.text[self.position : self.position + 20]) if self.position < len(self.text) else "the end"
        return f"not a tool call: {self.reason} at character {self.position}, found {found}"


@dataclass(frozen=True, eq=False)
class ToolCall:
    """A tool's name and its arguments, JSON values; equal if the tool and the values are, whatever their order.

    Numbers are equal by value, as in JSON, where 1 and 1.0 are the same and neither is ``true``.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ToolCall):
            return NotImplemented
        return self.name == other.name and equal_values(self.arguments, other.arguments)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Reply:
    """What an assistant wrote, taken apart."""

    said: str
    """The text outside of calls."""
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class ToolProtocol:
    """How calls are written into a reply.

    Attributes:
        name: As recipes and the command line spell it.
        parse: Takes a reply apart; raises :class:`ToolCallError` if it has a call that is not well-formed.
        format: Writes calls, so that ``parse`` gives them back; raises ValueError for what the protocol cannot hold.
        texts: Whether numbers and booleans may arrive as texts, for the schema to tell.
        join: Writes a reply that says something and calls; None puts calls on the lines behind.
    """

    name: str
    parse: Callable[[str], Reply]
    format: Callable[[Sequence[ToolCall]], str]
    texts: bool = False
    join: Callable[[str, Sequence[ToolCall]], str] | None = None

    def typed(self, call: ToolCall, schemas: ToolSchemas) -> ToolCall:
        """A call with the types that its schema wants, where the protocol writes texts."""
        return ToolCall(call.name, schemas.typed(call.name, call.arguments)) if self.texts else call

    def reply(self, said: str, calls: Sequence[ToolCall]) -> str:
        """A whole reply, which ``parse`` takes apart again.

        Raises:
            ValueError: For what the protocol cannot hold.
        """
        if not calls:
            return said
        if said and self.join is not None:
            return self.join(said, calls)
        return f"{said}\n{self.format(calls)}" if said else self.format(calls)


def parse_marked(text: str, mark: str, read_call: Callable[[str, int], tuple[ToolCall, int]]) -> Reply:
    """Take a reply apart whose calls begin with a mark.

    Args:
        text: The reply.
        mark: What a call begins with.
        read_call: Reads the call at a position; gives it, and the position behind it.
    """
    said: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while (start := text.find(mark, position)) >= 0:
        said.append(text[position:start])
        call, position = read_call(text, start)
        calls.append(call)
    return Reply("".join([*said, text[position:]]), tuple(calls))


def equal_values(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; Python alone takes true for 1."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal_values(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(equal_values(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
