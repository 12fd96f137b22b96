"""What a file of rows holds, without keeping the rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moeft.config.sources import Turns
from moeft.data.reading import RowReader
from moeft.data.rejects import Reject, summary
from moeft.data.rows import Row


@dataclass
class FileCheck:
    """Counts over a file. ``str()`` is a few lines for people."""

    source: str
    formats: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Turns and characters in all, and rows that have tools, calls, reasoning, a system turn, or are documents."""

    @property
    def reject_share(self) -> float:
        """Rejects by rows."""
        return len(self.rejects) / max(1, self.num_rows + len(self.rejects))

    def add(self, row: Row) -> None:
        """Count a row."""
        self.num_rows += 1
        self.counts["turns"] += len(row.messages)
        self.counts["characters"] += len(row.text or "") + sum(len(turn["content"]) for turn in row.messages)
        calls = any("tool_calls" in turn for turn in row.messages)
        reasoning = any("reasoning_content" in turn for turn in row.messages)
        system = any(turn["role"] == "system" for turn in row.messages)
        for name, present in (
            ("with a system turn", system),
            ("with tools", row.tools),
            ("with calls", calls),
            ("with reasoning", reasoning),
            ("documents", row.text is not None),
        ):
            self.counts[name] += bool(present)

    def __str__(self) -> str:
        formats = ", ".join(f"{name} {count:,}" for name, count in self.formats.most_common()) or "no known format"
        rows = max(1, self.num_rows)
        kinds = [f"{self.counts[name]:,} {name}" for name in list(self.counts)[2:] if self.counts[name]]
        lines = [
            f"{self.source}: {formats}",
            f"  {self.num_rows:,} rows usable, {len(self.rejects):,} rejected ({self.reject_share:.1%})",
            f"  {self.counts['turns'] / rows:.1f} turns and {self.counts['characters'] / rows:,.0f} characters a row",
            *([f"  {', '.join(kinds)}"] if kinds else []),
            *(f"  {line}" for line in summary(self.rejects)),
        ]
        return "\n".join(lines)


def check_file(path: str | Path, format: str | None = None, turns: Turns = "strict") -> FileCheck:
    """Read a file once and count what it holds.

    Args:
        path: As for :class:`moeft.data.reading.RowReader`.
        format: As for :class:`moeft.data.reading.RowReader`.
        turns: As for :class:`moeft.data.reading.RowReader`.

    Raises:
        DataError: If the file cannot be read as a whole.
        FileNotFoundError: If the path does not exist.
        ValueError: If ``format`` or ``turns`` is unknown.
    """
    reader = RowReader(path, format=format, turns=turns)
    found = FileCheck(reader.source)
    for item in reader:
        if isinstance(item, Row):
            found.add(item)
        else:
            found.rejects.append(item)
    found.formats = reader.formats
    return found
