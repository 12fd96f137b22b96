"""Whether calls of tools are those that are accepted, by the rules of the Berkeley Function-Calling Leaderboard.

Source:
    ``ast_checker.py`` of https://github.com/ShishirPatil/gorilla for Python, of which the tests hold verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moeft.tool_protocols import ToolCall

LEFT_OUT = ""
"""Among the accepted values of a parameter: it may be missing."""
TYPES = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_UNREAD = re.compile(r"[ ,./\-_*^]")


def accepts(accepted: Sequence[Mapping[str, Any]], calls: Sequence[ToolCall], functions: Sequence[Any]) -> bool:
    """Whether there are as many calls as wanted, and each is accepted for one of them, in any order.

    Args:
        accepted: For each wanted call its function, and for each parameter the values that are right, as
            ``{"f": {"a": [1, 2], "b": ["x", ""]}}``.
        calls: What was called.
        functions: Descriptions of the functions, with Python's names of types.
    """
    described = {function["name"]: function for function in functions}
    left = list(calls)
    for wanted in accepted:
        ((name, values),) = wanted.items()
        # The first that fits is taken, as the leaderboard does it.
        found = next((i for i, call in enumerate(left) if _is_accepted(call, described[name], values)), None)
        if found is None:
            return False
        del left[found]
    return not left


def same_function(one: str, other: str) -> bool:
    """Whether two names are the same; APIs that take no dots in names have underscores there."""
    return one.replace(".", "_") == other.replace(".", "_")


def _is_accepted(call: ToolCall, function: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    parameters = function["parameters"]
    properties, required = parameters["properties"], parameters.get("required", ())
    if not same_function(call.name, function["name"]) or any(key not in call.arguments for key in required):
        return False
    for key, value in call.arguments.items():
        if key not in properties or key not in values or not _is_value(value, properties[key], values[key]):
            return False
    return all(key in call.arguments or LEFT_OUT in of_key for key, of_key in values.items())


def _is_value(value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> bool:
    wanted = TYPES[schema["type"]]
    inner = TYPES[schema["items"]["type"]] if schema["type"] in ("array", "tuple") else None
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    # Where the accepted values are of another type than the schema's, they are names of variables.
    other = next((type(answer) for answer in accepted if answer != LEFT_OUT), None)
    is_variable = other is not None and other is not wanted
    fits = type(value) is wanted
    if inner is not None and isinstance(value, list):
        fits = fits and _holds(value, inner, accepted)
    if not fits and type(value) is not other:
        return False
    if not fits or is_variable:
        return value in accepted
    if wanted is dict:
        return any(_is_dict(value, answer) for answer in accepted if answer != LEFT_OUT)
    if wanted is list and inner is dict:
        return any(_are_dicts(value, answer) for answer in accepted)
    if wanted is list:
        return [_read(item) for item in value] in [[_read(item) for item in answer] for answer in accepted]
    if wanted is str:
        return _read(value) in [_read(answer) for answer in accepted if isinstance(answer, str)]
    return value in accepted


def _holds(values: list[Any], inner: type, accepted: Sequence[Any]) -> bool:
    """Whether all items of a list are of the schema's type, or of that of the items of an accepted list."""
    for answer in accepted:
        if not isinstance(answer, list):
            return True
        other = next((type(item) for item in answer if item != LEFT_OUT), None)
        if all(type(value) in (inner, other) for value in values):
            return True
    return False


def _is_dict(value: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    return all(key in answer for key in value) and all(
        _read(value[key]) in [_read(item) for item in items] if key in value else LEFT_OUT in items
        for key, items in answer.items()
    )


def _are_dicts(values: Sequence[Any], answers: Sequence[Any]) -> bool:
    return len(values) == len(answers) and all(
        isinstance(value, Mapping) and isinstance(answer, Mapping) and _is_dict(value, answer)
        for value, answer in zip(values, answers, strict=True)
    )


def _read(value: Any) -> Any:
    """A text as it is compared: without case, spaces and some marks, and with one kind of quotes."""
    return _UNREAD.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
