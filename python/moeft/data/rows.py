"""The normal form of chat rows, and what reading a source gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from moeft.data.rejects import Reject, write_rejects


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates of transformers read."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str
    reasoning_content: NotRequired[str]
    """What an assistant thought before it answered; not part of ``content``."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """``{"type": "function", "function": {"name": str, "arguments": object}}``; ``content`` may be empty then."""
    name: NotRequired[str]
    """Of a turn of role "tool": the tool that answered."""
    tool_call_id: NotRequired[str]
    """Of a turn of role "tool": the call that it answers."""
    train: NotRequired[bool]
    """Whether an assistant turn counts in the loss; absent, the mask mode decides."""


@dataclass(frozen=True)
class Row:
    """A conversation, or a plain text, and where it came from."""

    messages: list[Message]
    line: int
    """Line in the file, or position in the sequence; counted from 1."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of the tools that the assistant may call, as OpenAI's ``tools``; for the chat template."""
    text: str | None = None
    """A document for continued pretraining, every token of which counts; ``messages`` is empty then."""


@dataclass(frozen=True)
class ReadSummary:
    """How many rows of a source are usable, without the rows. ``str()`` is a line for people."""

    source: str
    kept: int
    rejected: int
    formats: Mapping[str, int]
    """Rows that could be read, by format, most first."""
    filtered: Mapping[str, int]
    """Rows left out by filter; they are among the rejected ones."""

    def __str__(self) -> str:
        formats = ", ".join(f"{name} {count}" for name, count in self.formats.items())
        text = f"{self.source}: {formats}; {self.kept} rows kept, {self.rejected} rejected"
        return text + "".join(f", {count} by {name}" for name, count in self.filtered.items() if count)


@dataclass(frozen=True)
class Rows:
    """What was read: usable rows, and the rest with reasons."""

    rows: list[Row]
    rejects: list[Reject]
    source: str
    """Path of the file, or "rows" for rows given as objects."""
    formats: Mapping[str, int] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> ReadSummary:
        """The counts."""
        return ReadSummary(self.source, len(self.rows), len(self.rejects), dict(self.formats), dict(self.filtered))

    def write_rejects(self, path: str | Path) -> None:
        """Write the rejects as JSON lines, ``{"source", "line", "reason"}``; the file is empty if there are none."""
        write_rejects(self.rejects, path)

    def __str__(self) -> str:
        return str(self.summary)
