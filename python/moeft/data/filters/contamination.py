"""Rows that hold a piece of an evaluation set.

Source:
    Brown et al., Language Models are Few-Shot Learners, appendix C: overlaps of 13 words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.filters import Contamination
from moeft.data.files import open_records
from moeft.data.filters.filter import text_of, words_of
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Row


class ContaminationFilter:
    """Leaves out rows with as many equal words in a row as the settings say.

    Every text in the records of the evaluation files counts, whatever its key; a text with fewer words is compared as a
    whole if it has at least half as many.

    Raises:
        DataError: If a file holds no text that is long enough to compare.
    """

    name = "contamination"

    def __init__(self, settings: Contamination) -> None:
        self._runs: dict[int, dict[str, str]] = {}
        self._beginnings: set[tuple[str, str]] = set()
        for path in settings.files:
            before = sum(map(len, self._runs.values()))
            for text in _texts(path):
                self._add(words_of(text), settings.words, path.name)
            if sum(map(len, self._runs.values())) == before:
                raise DataError(f"{path}: no text has {settings.words // 2 + 1} words that are not in an earlier file")

    def reason(self, row: Row, place: str) -> str | None:
        """The first piece that an evaluation set has too, or None."""
        words = words_of(text_of(row))
        for start, pair in enumerate(itertools.pairwise(words)):
            # Few places begin like any piece, so most are passed with one look into a set.
            if pair not in self._beginnings:
                continue
            for length, runs in self._runs.items():
                run = " ".join(words[start : start + length])
                if run in runs:
                    return f"holds {run!r}, as {runs[run]} does"
        return None

    def _add(self, words: Sequence[str], length: int, name: str) -> None:
        if len(words) <= length // 2:
            return
        length = min(length, len(words))
        runs = self._runs.setdefault(length, {})
        for start in range(len(words) - length + 1):
            runs.setdefault(" ".join(words[start : start + length]), name)
            self._beginnings.add((words[start], words[start + 1]))


def _texts(path: Path) -> Iterator[str]:
    for _, record in open_records(path):
        if isinstance(record, DataError):
            raise DataError(f"{path}: {record}")
        yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
