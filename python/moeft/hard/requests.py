"""Conversations with the calls that are right at their end: what pairs are made from, and what models are asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.data.filters.filter import words_of
from moeft.data.reading import read_rows
from moeft.data.rejects import Reject
from moeft.data.rows import Message, Row
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.tool_protocols import ToolCall, ToolCallError, ToolProtocol

FEWEST_WORDS = 3
"""A held-out request of fewer words is a common phrase; it counts only where it is a whole turn."""


@dataclass(frozen=True)
class Request:
    """A conversation up to the turn that is asked for, and what is right there."""

    prompt: list[Message]
    calls: tuple[ToolCall, ...]
    """None where no tool is to be called."""
    said: str
    """What the reference says beside its calls."""
    after: str
    """What the assistant says once the tools have answered; empty if the conversation ends before."""
    line: int

    @property
    def text(self) -> str:
        """The user's last turn."""
        return next(message["content"] for message in reversed(self.prompt) if message["role"] == "user")


@dataclass(frozen=True)
class Requests:
    """What was read: usable requests, and the rest with reasons."""

    requests: list[Request]
    rejects: list[Reject]


def read_requests(
    data: str | Path | Iterable[Any], schemas: ToolSchemas, protocol: ToolProtocol, held_out: HeldOutTexts | None = None
) -> Requests:
    """Read chat rows; the last assistant turn with a call, or else the last one, is the reference.

    Args:
        data: Rows in any format of :mod:`moeft.data.formats`; calls as ``tool_calls`` or in the protocol's text.
        schemas: The tools; a row whose calls break them is a reject.
        protocol: How calls stand in texts.
        held_out: Requests that must not be used; a row with one of them is a reject.

    Raises:
        DataError: If no row can be used.
    """
    rows = read_rows(data, turns="any")
    requests: list[Request] = []
    rejects = list(rows.rejects)
    for row in rows.rows:
        try:
            request = _request(row, schemas, protocol)
            if held_out is not None and (reason := held_out.leak(request.prompt)):
                raise DataError(reason)
            requests.append(request)
        except (DataError, ToolCallError) as error:
            rejects.append(Reject(row.line, str(error), rows.source))
    if not requests:
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{rows.source}: no row is a request with its calls. First reasons: {first}")
    return Requests(requests, rejects)


class HeldOutTexts:
    """Users' turns that must not be trained on, wherever in a turn they stand and however it is punctuated."""

    def __init__(self, requests: Iterable[Sequence[Message]]) -> None:
        turns = {
            tuple(words_of(message["content"]))
            for prompt in requests
            for message in prompt
            if message["role"] == "user"
        }
        self._whole = turns
        self._inside = {words for words in turns if len(words) >= FEWEST_WORDS}
        self._lengths = sorted({len(words) for words in self._inside})

    def leak(self, prompt: Sequence[Message]) -> str | None:
        """The first held-out request that a prompt holds, as a reason; None if there is none."""
        for message in prompt:
            if message["role"] != "user":
                continue
            words = tuple(words_of(message["content"]))
            if words in self._whole:
                return f"holds the held-out request {' '.join(words)[:80]!r}"
            for length in self._lengths:
                for start in range(len(words) - length + 1):
                    if words[start : start + length] in self._inside:
                        return f"holds the held-out request {' '.join(words[start : start + length])[:80]!r}"
        return None


def _request(row: Row, schemas: ToolSchemas, protocol: ToolProtocol) -> Request:
    read = [(index, *_read_turn(m, protocol)) for index, m in enumerate(row.messages) if m["role"] == "assistant"]
    if not read:
        raise DataError("no turn of the assistant")
    index, said, calls = next((turn for turn in reversed(read) if turn[2]), read[-1])
    prompt = row.messages[:index]
    if not any(message["role"] == "user" for message in prompt):
        raise DataError("no turn of the user before the answer")
    calls = tuple(protocol.typed(call, schemas) for call in calls)
    for call in calls:
        if problem := schemas.problem(call.name, call.arguments):
            raise DataError(problem)
    after = next((said for later, said, _ in read if later > index), "")
    return Request(prompt, calls, said, after, row.line)


def _read_turn(message: Message, protocol: ToolProtocol) -> tuple[str, tuple[ToolCall, ...]]:
    if calls := message.get("tool_calls"):
        found = tuple(ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in calls)
        return message["content"].strip(), found
    reply = protocol.parse(message["content"])
    return reply.said.strip(), reply.calls
