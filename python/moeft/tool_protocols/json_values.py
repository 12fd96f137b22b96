"""JSON inside of a reply, with positions of what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

from moeft.tool_protocols.call import ToolCallError

_SPACE = re.compile(r"\s*")


def read_json(text: str, position: int) -> tuple[Any, int]:
    """Read the JSON value that begins at a position.

    Returns:
        The value, and the position behind it.

    Raises:
        ToolCallError: If there is none, a key is given twice, or a number is not finite.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise ToolCallError(text, min(error.pos, len(text)), f"no valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ToolCallError(text, position, "JSON that is nested too deep") from error
    except ValueError as error:  # of the hooks, or a number of thousands of digits
        raise ToolCallError(text, position, f"no valid JSON ({error})") from error


def behind_space(text: str, position: int) -> int:
    """The position of the first character that is no white space, from a position on."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def write_json(value: Any) -> str:
    """A JSON text on one line.

    Raises:
        ValueError: If the value has no JSON form.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{value!r} has no JSON form: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
