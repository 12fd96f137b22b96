"""Rows that cannot be used: listed one by one, counted by reason, and too many of them refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeft.errors import DataError


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    line: int
    """Line in the file, or position in the sequence; counted from 1."""
    reason: str
    source: str


def write_rejects(rejects: Iterable[Reject], path: str | Path) -> None:
    """Write rejects as JSON lines, ``{"source", "line", "reason"}``."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for reject in rejects:
            record = {"source": reject.source, "line": reject.line, "reason": reject.reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def by_reason(rejects: Iterable[Reject]) -> list[tuple[str, int, Reject]]:
    """Reasons with the number of their rejects and the first of these, most frequent first.

    Reasons that differ in their numbers or in a quoted word count as one: ``messages[3].role`` as ``messages[1].role``.
    """
    groups: dict[str, list[Reject]] = {}
    for reject in rejects:
        groups.setdefault(re.sub(r"\d[\d,]*|'[^']*'|\"[^\"]*\"", "_", reject.reason), []).append(reject)
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    return [(group[0].reason, len(group), group[0]) for group in ordered]


def summary(rejects: Iterable[Reject], most: int = 5) -> list[str]:
    """One line per reason with its count and an example, the most frequent ones."""
    groups = by_reason(rejects)
    lines = [f"{count} x {reason} (first: line {first.line})" for reason, count, first in groups[:most]]
    return lines + ([f"and {len(groups) - most} other reasons"] if len(groups) > most else [])


def check_share(rejects: Sequence[Reject], num_rows: int, most: float, source: str) -> None:
    """Stop when so many rows cannot be read that the file is probably not what it was taken for.

    Args:
        rejects: What could not be used.
        num_rows: Rows in all, usable or not.
        most: Largest share of rejects that is accepted, 0 to 1.
        source: Name of the file.

    Raises:
        DataError: With a summary by reason.
    """
    if len(rejects) > most * num_rows:
        share = len(rejects) / num_rows
        raise DataError(
            "\n  ".join(
                [
                    f"{source}: {len(rejects)} of {num_rows} rows ({share:.1%}) cannot be used, at most {most:.1%} may "
                    "be left out; mend the file, or raise data.max_reject_share:",
                    *summary(rejects),
                ]
            )
        )
