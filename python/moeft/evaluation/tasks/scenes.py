"""Scenes in a tool protocol: whether the calls of a reply are valid, and how the lines in them are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.evaluation.request import Answer
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Item, Metric, Task, share
from moeft.evaluation.tasks.replies import chat_item, texts
from moeft.evaluation.tasks.style import style
from moeft.tool_protocols import ToolCallError, ToolProtocol, protocol
from moeft.tool_protocols.validity import problem_of_reply

MAX_NEW_TOKENS = 512
VALID = "valid_protocol"


def scenes(rows: Sequence[Record], phrases: Sequence[Path]) -> Task:
    """Rows with a ``prompt`` or ``messages``, ``tools``, a ``protocol`` and the arguments that hold ``prose``.

    The metrics of :func:`~moeft.evaluation.tasks.style.style` count the prose alone: the arguments named by ``prose``,
    and what is said beside calls. Of a reply that the protocol cannot read they count everything.

    Args:
        rows: The prompts; what moeft's stage ``scenes`` writes.
        phrases: As for ``style``.

    Raises:
        DataError: If a row names no known protocol, or its tools or prose cannot be used.
    """
    items = [chat_item("scenes", line, row, MAX_NEW_TOKENS, _Scene(line, row)) for line, row in rows]
    written = style(rows, phrases)

    def grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
        prose = written.grade([(item, {"reply": item.reference.prose(answer["reply"])}) for item, answer in answered])
        return [
            {VALID: share(item.reference.is_valid(answer["reply"])), **figures}
            for (item, answer), figures in zip(answered, prose, strict=True)
        ]

    return Task("scenes", tuple(items), (Metric(VALID), *written.metrics), grade)


class _Scene:
    """What grading a row needs."""

    def __init__(self, line: str, row: Mapping[str, Any]) -> None:
        self._prose = frozenset(texts(row, "prose", "scenes", line))
        try:
            self._protocol: ToolProtocol = protocol(str(row.get("protocol")))
            self._schemas = ToolSchemas(row.get("tools"))
        except (DataError, ValueError) as error:
            raise DataError(f"task scenes: row {line}: {error}") from error

    def is_valid(self, reply: str) -> bool:
        return problem_of_reply(reply.strip(), self._protocol, self._schemas) is None

    def prose(self, reply: str) -> str:
        try:
            read = self._protocol.parse(reply)
        except ToolCallError:
            return reply
        written = [call.arguments[name] for call in read.calls for name in call.arguments if name in self._prose]
        return "\n".join([read.said, *_texts(written)])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
