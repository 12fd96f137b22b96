"""What a format is, and what it makes of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from moeft.data.rows import Message


class Parsed(NamedTuple):
    """What a row says, in the normal form of :class:`moeft.data.rows.Row`."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Format:
    """One way of writing a conversation as an object."""

    name: str
    """As in recipes and messages."""
    keys: tuple[tuple[str, ...], ...]
    """Sets of keys that are not null in a row of this format; one set is enough."""
    parse: Callable[[Mapping[str, Any]], Parsed]
    """Raises ``DataError`` if the row is not what the format demands."""

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Whether a row has the keys of this format."""
        return any(all(record.get(key) is not None for key in keys) for keys in self.keys)


def kind(value: Any) -> str:
    """A value's JSON type in words, for messages."""
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
