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
from moeft.data.filters.filter import words_of
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Row


class ContaminationFilter:
    """Leaves out rows with as many equal words in a row as the settings say.

    Every text in the records of the evaluation files counts, whatever its key. A text with fewer words, down to half as
    many, counts where it is a whole turn: as a part of a longer one it is more likely a common phrase.

    Raises:
        DataError: If a file holds no text that is long enough to compare.
    """

    name = "contamination"

    def __init__(self, settings: Contamination) -> None:
        self._length = settings.words
        self._runs: dict[str, str] = {}
        self._whole: dict[str, str] = {}
        self._beginnings: set[tuple[str, str]] = set()
        for path in settings.files:
            num_texts = sum(self._add(words_of(text), path.name) for text in _texts(path))
            if not num_texts:
                raise DataError(f"{path}: no text has {settings.words // 2 + 1} words, so there is nothing to compare")

    def reason(self, row: Row, place: str) -> str | None:
        """The first piece that an evaluation set has too, or None."""
        for text in [row.text or "", *(message["content"] for message in row.messages)]:
            words = words_of(text)
            if len(words) < self._length:
                piece = " ".join(words)
                if piece in self._whole:
                    return f"holds the turn {piece!r}, as {self._whole[piece]} does"
            # Few places begin like any run, so most are passed with one look into a set.
            for start, pair in enumerate(itertools.pairwise(words)):
                if pair in self._beginnings:
                    run = " ".join(words[start : start + self._length])
                    if run in self._runs:
                        return f"holds {run!r}, as {self._runs[run]} does"
        return None

    def _add(self, words: Sequence[str], name: str) -> bool:
        if len(words) <= self._length // 2:
            return False
        if len(words) < self._length:
            self._whole.setdefault(" ".join(words), name)
        for start in range(len(words) - self._length + 1):
            self._runs.setdefault(" ".join(words[start : start + self._length]), name)
            self._beginnings.add((words[start], words[start + 1]))
        return True


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
