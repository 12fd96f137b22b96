"""Alpaca's form: ``instruction``, ``input`` and ``output``; ``system`` and ``history`` as in LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import Format, Parsed, kind
from moeft.data.formats.sharegpt import with_system
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read an instruction and its output; an input follows the instruction on a line of its own.

    Raises:
        DataError: If a value is no text, or ``history`` is no list of pairs.
    """
    parts = [_text(record, key) for key in ("instruction", "input")]
    request = "\n".join(part for part in parts if part)
    turns = [*_history(record.get("history")), request, _text(record, "output")]
    messages: list[Message] = [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)
    ]
    return Parsed(with_system(record.get("system"), messages))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None and key == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key} is {kind(value)}, expected a string")
    return value


def _history(history: Any) -> list[str]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise DataError(f"history is {kind(history)}, expected a list of pairs of instruction and output")
    texts: list[str] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"history[{index}] is {kind(pair)}, expected a pair of instruction and output")
        texts += pair
    return texts


FORMAT = Format("alpaca", (("instruction", "output"),), parse)
