r"""The bracket protocol of tool calls: ``[TOOL: name key="value" key2="value"]``.

Grammar, strict: one space before the name and before each key, no other white space outside values::

    call  = "[TOOL: " name *( " " key "=" DQUOTE value DQUOTE ) "]"
    name  = key = (letter / "_") *( letter / digit / "_" )            ; ASCII
    value = *( any character except DQUOTE, "\" and line breaks / "\" DQUOTE / "\\" )
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeft.errors import DataError

_OPEN = "[TOOL: "
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r'[^"\\\r\n]+')


class ToolCallError(DataError):
    """A text is not one call of the bracket protocol."""

    def __init__(self, text: str, position: int, reason: str) -> None:
        super().__init__(text, position, reason)
        self.text = text
        self.position = position
        """Index of the first character that cannot be read, 0-based; the length of the text if it ends too early."""
        self.reason = reason

    def __str__(self) -> str:
        found = repr(self.text[self.position : self.position + 20]) if self.position < len(self.text) else "the end"
        return f"not a tool call: {self.reason} at character {self.position}, found {found}"


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and its arguments; equal if the tool and the mapping are, whatever the order of the arguments."""

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)


def parse_tool_call(text: str) -> ToolCall:
    """Read a text that is exactly one call.

    Args:
        text: The whole answer; anything before or after the call, white space included, makes it invalid.

    Raises:
        ToolCallError: With the position and the reason.

    Examples:
        >>> parse_tool_call('[TOOL: tail_logs service="mail" lines="50"]')
        ToolCall(name='tail_logs', arguments={'service': 'mail', 'lines': '50'})
    """
    if not text.startswith(_OPEN):
        raise ToolCallError(text, 0, f"expected {_OPEN!r}")
    name, position = _identifier(text, len(_OPEN), "the name of a tool")
    arguments: dict[str, str] = {}
    while text.startswith(" ", position):
        start = position + 1
        key, position = _identifier(text, start, "the name of an argument")
        if key in arguments:
            raise ToolCallError(text, start, f"argument {key!r} is given twice")
        if not text.startswith('="', position):
            raise ToolCallError(text, position, "expected '=\"'")
        arguments[key], position = _value(text, position + 2)
    if not text.startswith("]", position):
        raise ToolCallError(text, position, "expected ' ' and an argument, or ']'")
    if position + 1 != len(text):
        raise ToolCallError(text, position + 1, "text after the call")
    return ToolCall(name, arguments)


def format_tool_call(call: ToolCall) -> str:
    """Write a call; arguments keep their order.

    Raises:
        ValueError: If a name is not an identifier, or a value has a line break.
    """
    for name in (call.name, *call.arguments):
        if not _IDENTIFIER.fullmatch(name):
            raise ValueError(f"{name!r} cannot be written in the protocol, expected letters, digits and underscores")
    parts = [call.name]
    for key, value in call.arguments.items():
        if "\n" in value or "\r" in value:
            raise ValueError(f"argument {key!r} has a line break, which the protocol cannot hold: {value!r}")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'{key}="{escaped}"')
    return _OPEN + " ".join(parts) + "]"


def canonical(text: str) -> str:
    """Rewrite a call with its arguments sorted by name, so that equal calls are equal texts.

    Raises:
        ToolCallError: If the text is not a call.
    """
    call = parse_tool_call(text)
    return format_tool_call(ToolCall(call.name, dict(sorted(call.arguments.items()))))


def exact_match(prediction: str, reference: str) -> bool:
    """Whether an answer is exactly one valid call with the tool and the argument mapping of the reference.

    Raises:
        ToolCallError: If the *reference* is not a call; an invalid prediction is simply not a match.
    """
    expected = parse_tool_call(reference)
    try:
        return parse_tool_call(prediction) == expected
    except ToolCallError:
        return False


def _identifier(text: str, position: int, what: str) -> tuple[str, int]:
    match = _IDENTIFIER.match(text, position)
    if match is None:
        raise ToolCallError(text, position, f"expected {what}")
    return match.group(), match.end()


def _value(text: str, position: int) -> tuple[str, int]:
    """Read a value up to its closing quote; returns it unescaped, and the position after the quote."""
    parts: list[str] = []
    while True:
        if match := _PLAIN.match(text, position):
            parts.append(match.group())
            position = match.end()
        if text.startswith('"', position):
            return "".join(parts), position + 1
        if text.startswith(('\\"', "\\\\"), position):
            parts.append(text[position + 1])
            position += 2
        elif text.startswith("\\", position):
            raise ToolCallError(text, position, 'expected \\" or \\\\ after a backslash')
        else:
            raise ToolCallError(text, position, "expected a closing '\"'")
