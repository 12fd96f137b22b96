"""Calls as Python writes them, ``[f(a=1), g.h(b="x")]``: what models without calls of their own are asked for.

An argument whose name Python keeps for itself stands in ``**{"from": 1}``.

Source:
    The prompts of the Berkeley Function-Calling Leaderboard, https://gorilla.cs.berkeley.edu/leaderboard.html
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Sequence
from typing import Any

from moeft.tool_protocols.call import Reply, ToolCall, ToolCallError, ToolProtocol
from moeft.tool_protocols.json_values import write_json

_BEGINS = re.compile(r"\s*(?:\[\s*)?[^\W\d][\w.]*\(")


def parse(text: str) -> Reply:
    """Take a reply apart; one that does not begin as a call or a list of calls was said and calls nothing.

    A value that is no literal, such as a name, is the text that stands there.

    Raises:
        ToolCallError: If it begins so and is not calls with named arguments to its end.
    """
    if not _BEGINS.match(text):
        return Reply(text, ())
    start = len(text) - len(text.lstrip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # What Python thinks of a reply's escapes is no matter.
            tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return Reply("", tuple(_call(node, text, start) for node in nodes))
    except ToolCallError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ToolCallError(text, start, f"no calls in Python's words ({error})") from error


def format_calls(calls: Sequence[ToolCall]) -> str:
    """A list of calls.

    Raises:
        ValueError: If a tool's name cannot stand in Python, or a value has no JSON form.
    """
    return f"[{', '.join(map(_written, calls))}]"


def _call(node: ast.expr, text: str, start: int) -> ToolCall:
    if not isinstance(node, ast.Call) or not re.fullmatch(r"[\w.]+", name := ast.unparse(node.func)):
        raise ToolCallError(text, start, "expected calls of functions alone")
    pairs: list[tuple[str, Any]] = []
    for argument in node.keywords:
        value = _value(argument.value)
        if argument.arg is None and not isinstance(value, dict):
            raise ToolCallError(text, start, f"{name} has ** before what is no dict")
        pairs += value.items() if argument.arg is None else [(argument.arg, value)]
    arguments = dict(pairs)
    if node.args or len(arguments) < len(pairs):
        fault = "an argument without a name" if node.args else "an argument twice"
        raise ToolCallError(text, start, f"{name} has {fault}")
    return ToolCall(name, arguments)


def _value(node: ast.expr) -> Any:
    try:
        # Through JSON, so that a tuple is a list and what JSON lacks is no value.
        return json.loads(json.dumps(_with_text_keys(ast.literal_eval(node)), allow_nan=False))
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ast.unparse(node)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise TypeError("a key that is no text")  # json would write it as one
    if isinstance(value, dict):
        return {key: _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _written(call: ToolCall) -> str:
    if not all(map(_is_name, call.name.split("."))):
        raise ValueError(f"{call.name!r} cannot be written, expected a name of Python")
    arguments = json.loads(write_json(dict(call.arguments)))
    named = [f"{key}={value!r}" for key, value in arguments.items() if _is_name(key)]
    others = {key: value for key, value in arguments.items() if not _is_name(key)}
    return f"{call.name}({', '.join([*named, *([f'**{others!r}'] if others else [])])})"


def _is_name(text: str) -> bool:
    # Python takes other spellings of a letter for the same name.
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


PROTOCOL = ToolProtocol("python", parse, format_calls)
