r"""The bracket protocol of tool calls: ``[TOOL: name key="value" choices='["a", "b"]']``.

Grammar, strict: one space before the name and before each key, no other white space outside values::

    call  = "[TOOL: " name *( " " key "=" ( text / json ) ) "]"
    name  = key = (letter / "_") *( letter / digit / "_" )            ; ASCII
    text  = DQUOTE *( any character except DQUOTE, "\" and line breaks / "\" DQUOTE / "\\" ) DQUOTE
    json  = "'" JSON value without "'" and line breaks, which its strings write as escapes "'"
"""

import re
from collections.abc import Sequence
from typing import Any

from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol, parse_marked
from moeft.tool_protocols.json_values import read_json, write_json

_OPEN = "[TOOL: "
_MARK = "[TOOL:"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r'[^"\\\r\n]+')
_LINE_BREAK = re.compile(r"[\r\n]")


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
    call, position = _call(text, 0)
    if position != len(text):
        raise ToolCallError(text, position, "text after the call")
    return call


def parse_reply(text: str) -> Reply:
    """Take a reply apart: calls and the text around them.

    Raises:
        ToolCallError: If a call is begun that is not well-formed.
    """
    return parse_marked(text, _MARK, _call)


def _call(text: str, position: int) -> tuple[ToolCall, int]:
    """Read the call that begins at a position; returns it, and the position behind it."""
    if not text.startswith(_OPEN, position):
        raise ToolCallError(text, position, f"expected {_OPEN!r}")
    name, position = _identifier(text, position + len(_OPEN), "the name of a tool")
    arguments: dict[str, Any] = {}
    while text.startswith(" ", position):
        start = position + 1
        key, position = _identifier(text, start, "the name of an argument")
        if key in arguments:
            raise ToolCallError(text, start, f"argument {key!r} is given twice")
        if text.startswith('="', position):
            arguments[key], position = _value(text, position + 2)
        elif text.startswith("='", position):
            arguments[key], position = _json(text, position + 2)
        else:
            raise ToolCallError(text, position, "expected '=\"'")
    if not text.startswith("]", position):
        raise ToolCallError(text, position, "expected ' ' and an argument, or ']'")
    return ToolCall(name, arguments), position + 1


def format_tool_call(call: ToolCall) -> str:
    """Write a call; arguments keep their order, and those that are no text are written as JSON.

    Raises:
        ValueError: If a name is not an identifier, a text has a line break, or a value has no JSON form.
    """
    for name in (call.name, *call.arguments):
        if not _IDENTIFIER.fullmatch(name):
            raise ValueError(f"{name!r} cannot be written in the protocol, expected letters, digits and underscores")
    return (
        _OPEN + " ".join([call.name, *(f"{key}={_written(key, value)}" for key, value in call.arguments.items())]) + "]"
    )


def _written(key: str, value: Any) -> str:
    if not isinstance(value, str):
        return "'" + write_json(value).replace("'", "\\u0027") + "'"
    if _LINE_BREAK.search(value):
        raise ValueError(f"argument {key!r} has a line break, which the protocol cannot hold: {value!r}")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


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


def _json(text: str, position: int) -> tuple[Any, int]:
    """Read a JSON value up to its closing quote; returns it, and the position after the quote."""
    stop = text.find("'", position)
    if stop < 0:
        raise ToolCallError(text, len(text), 'expected a closing "\'"')
    if line_break := _LINE_BREAK.search(text, position, stop):
        raise ToolCallError(text, line_break.start(), "expected no line break")
    value, end = read_json(text[:stop], position)
    if end != stop:
        raise ToolCallError(text, end, 'expected a closing "\'" behind the JSON value')
    return value, stop + 1


def _format(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(format_tool_call, calls))


PROTOCOL = ToolProtocol("bracket", parse_reply, _format, texts=True)
