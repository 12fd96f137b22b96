"""Preference rows: a prompt with the answer that was chosen and the one that was rejected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.data.files import open_records
from moeft.data.formats.format import kind
from moeft.data.formats.message_list import read_turns
from moeft.data.formats.prompt_completion import side
from moeft.data.formats.sharegpt import read_conversations, with_system
from moeft.data.formats.tool_calls import read_tools
from moeft.data.rejects import Reject, check_share
from moeft.data.rows import Message
from moeft.data.turns import arrange
from moeft.errors import DataError


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to the same conversation; ``prompt + chosen`` and ``prompt + rejected`` are whole conversations."""

    prompt: list[Message]
    """Up to and including the turn that is answered."""
    chosen: list[Message]
    rejected: list[Message]
    line: int
    """Line in the file, or position in the sequence; counted from 1."""
    tools: list[dict[str, Any]] | None = None
    """As of :class:`moeft.data.rows.Row`."""


@dataclass(frozen=True)
class PreferenceRows:
    """What was read: usable rows, and the rest with reasons."""

    rows: list[PreferenceRow]
    rejects: list[Reject]
    source: str


def read_preferences(data: str | Path | Iterable[Any], *, max_reject_share: float | None = None) -> PreferenceRows:
    """Read and validate preference rows.

    Rows have ``chosen`` and ``rejected``, each a text, a message or a list of messages, and the prompt as ``prompt``
    (text or messages), as ``conversations`` (LLaMA-Factory), or as the turns with which both answers begin.

    Args:
        data: As for :func:`moeft.data.reading.read_rows`.
        max_reject_share: Largest share of rows that may be unusable; None for no limit.

    Raises:
        DataError: If no row can be used, or more than ``max_reject_share`` cannot.
        FileNotFoundError: If the path does not exist.
    """
    source = str(data) if isinstance(data, str | Path) else "rows"
    records = open_records(data) if isinstance(data, str | Path) else enumerate(data, start=1)
    rows: list[PreferenceRow] = []
    rejects: list[Reject] = []
    for line, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            rows.append(read_preference(record, line))
        except DataError as error:
            rejects.append(Reject(line, str(error), source))
    if not rows:
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{source}: none of {len(rejects)} rows can be used. First reasons: {first or 'no rows'}")
    if max_reject_share is not None:
        check_share(rejects, len(rows) + len(rejects), max_reject_share, source)
    return PreferenceRows(rows, rejects, source)


def read_preference(record: Any, line: int) -> PreferenceRow:
    """Read one row.

    Raises:
        DataError: If a key is missing or wrong, the answers are equal, or the turns are not in order.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"the row is {kind(record)}, expected an object")
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise DataError(f"{key} is missing; expected prompt, chosen and rejected")
    chosen, rejected = _answer(record, "chosen"), _answer(record, "rejected")
    prompt = _prompt(record)
    if prompt is None:
        shared = _num_equal(chosen, rejected)
        prompt = chosen[:shared]
    for answer in (chosen, rejected):
        if len(answer) > len(prompt) and _num_equal(answer, prompt) == len(prompt):
            del answer[: len(prompt)]  # Both answers hold the prompt again.
    prompt = with_system(record.get("system"), prompt)
    if chosen == rejected:
        raise DataError("chosen and rejected are equal, so there is nothing to prefer")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            arrange(prompt + answer, "strict")
        except DataError as error:
            raise DataError(f"prompt and {key}: {error}") from error
        if not answer or answer[0]["role"] != "assistant":
            raise DataError(f"{key} does not begin with a turn of the assistant")
    return PreferenceRow(prompt, chosen, rejected, line, read_tools(record.get("tools")))


def _answer(record: Mapping[str, Any], key: str) -> list[Message]:
    value = record[key]
    if isinstance(value, Mapping):
        return read_conversations([value], key)
    return read_conversations(value, key) if isinstance(value, list) else side(value, key, "assistant")


def _prompt(record: Mapping[str, Any]) -> list[Message] | None:
    if record.get("conversations") is not None:
        return read_conversations(record["conversations"], "conversations")
    if record.get("messages") is not None:
        return read_turns(record["messages"], "messages")
    for key in ("prompt", "question", "instruction"):
        if record.get(key) is not None:
            return side(record[key], key, "user")
    return None


def _num_equal(one: list[Message], other: list[Message]) -> int:
    """Turns with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
