"""Reading chat rows from files and sequences of any format, one at a time or all of them.

Formats are those of :mod:`moeft.data.formats`, files those of :mod:`moeft.data.files`. Every row that cannot be used is
listed with its line and reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.sources import Turns
from moeft.data.files import open_records
from moeft.data.formats import Detector
from moeft.data.rejects import Reject, check_share
from moeft.data.rows import Message, ReadSummary, Row, Rows
from moeft.data.turns import arrange, check_turns
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.filters.filter import Filter


class RowReader:
    """Reads rows one at a time, so that a file need not fit into memory.

    Iterating yields a :class:`Row` or a :class:`Reject` per record, in the order of the file.

    Args:
        data: Path of a file or of a folder of ``datasets.save_to_disk``; or rows as mappings: a list, or a
            ``datasets.Dataset``.
        format: Name of a format of :data:`moeft.data.formats.FORMATS`; None tells each row by its keys.
        turns: Which order of turns is accepted, see :mod:`moeft.data.turns`.
        source: Name in messages and rejects; None takes the path.

    Attributes:
        formats: Usable rows so far, by format.

    Raises:
        DataError: For a file that cannot be read as a whole, while it is iterated.
        FileNotFoundError: If the path does not exist.
        ValueError: If ``format`` or ``turns`` is unknown.
    """

    def __init__(
        self,
        data: str | Path | Iterable[Any],
        *,
        format: str | None = None,
        turns: Turns = "strict",
        source: str | None = None,
    ) -> None:
        check_turns(turns)
        self._detector = Detector(format)
        self._turns = turns
        is_path = isinstance(data, str | Path)
        self.source = source or (str(data) if is_path else "rows")
        self._records = open_records(data) if isinstance(data, str | Path) else enumerate(data, start=1)
        self.formats: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row | Reject]:
        for line, record in self._records:
            try:
                if isinstance(record, DataError):
                    raise record
                name, parsed = self._detector.parse(record)
                messages = parsed.messages if parsed.text is not None else arrange(parsed.messages, self._turns)
            except DataError as error:
                yield Reject(line, str(error), self.source)
            else:
                self.formats[name] += 1
                yield Row(messages, line, parsed.tools, parsed.text)


class RowStream:
    """The rows of one source as they are read: with a system turn, filtered, and counted. Good for one pass.

    Iterating yields a :class:`Row` or a :class:`Reject` per record, in the order of the file.

    Args:
        reader: Of the source.
        max_reject_share: Largest share of rows that may be unusable; None for no limit.
        system: System turn of rows that have none; None leaves them as they are.
        filters: In their order; the first that refuses a row gives the reason, and later ones do not see it.

    Raises:
        DataError: At the end of the pass, if there was no row, none is left, or more than ``max_reject_share`` cannot
            be used; the message has the first reasons.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        max_reject_share: float | None = None,
        system: str | None = None,
        filters: Sequence[Filter] = (),
    ) -> None:
        self.source = reader.source
        self._reader = reader
        self._max_reject_share = max_reject_share
        self._system = system
        self._filters = filters
        self._kept = self._rejected = 0
        self._filtered = Counter({filter.name: 0 for filter in filters})

    @property
    def summary(self) -> ReadSummary:
        """The counts so far."""
        formats = dict(self._reader.formats.most_common())
        return ReadSummary(self.source, self._kept, self._rejected, formats, dict(self._filtered))

    def __iter__(self) -> Iterator[Row | Reject]:
        unreadable: list[Reject] = []
        for item in self._reader:
            if isinstance(item, Reject):
                unreadable.append(item)
            else:
                item = self._filter(item if self._system is None else _with_system(item, self._system))
            self._kept += isinstance(item, Row)
            self._rejected += isinstance(item, Reject)
            yield item
        num_rows = self._kept + self._rejected
        if self._max_reject_share is not None:
            check_share(unreadable, num_rows, self._max_reject_share, self.source)
        if len(unreadable) == num_rows:
            raise DataError(_nothing_left(self.source, unreadable))
        if not self._kept:
            counts = ", ".join(f"{name} {count}" for name, count in self._filtered.items())
            raise DataError(f"{self.source}: the filters leave no row ({counts}); loosen them, or drop the source")

    def _filter(self, row: Row) -> Row | Reject:
        for filter in self._filters:
            reason = filter.reason(row, f"{self.source} line {row.line}")
            if reason is not None:
                self._filtered[filter.name] += 1
                return Reject(row.line, f"{filter.name}: {reason}", self.source)
        return row

    def collect(self) -> Rows:
        """All rows in memory."""
        rows: list[Row] = []
        rejects: list[Reject] = []
        for item in self:
            if isinstance(item, Row):
                rows.append(item)
            else:
                rejects.append(item)
        return Rows(rows, rejects, self.source, self.summary.formats, self.summary.filtered)


def read_rows(
    data: str | Path | Iterable[Any],
    *,
    format: str | None = None,
    turns: Turns = "strict",
    max_reject_share: float | None = None,
    source: str | None = None,
) -> Rows:
    """Read and validate rows.

    Args:
        data: As for :class:`RowReader`.
        format: As for :class:`RowReader`.
        turns: As for :class:`RowReader`.
        max_reject_share: As for :class:`RowStream`.
        source: As for :class:`RowReader`.

    Raises:
        DataError: As :class:`RowReader` and :class:`RowStream` do.
        FileNotFoundError: If the path does not exist.
        ValueError: If ``format`` or ``turns`` is unknown.
    """
    reader = RowReader(data, format=format, turns=turns, source=source)
    return RowStream(reader, max_reject_share=max_reject_share).collect()


def _with_system(row: Row, system: str) -> Row:
    if row.text is not None or row.messages[0]["role"] == "system":
        return row
    first: Message = {"role": "system", "content": system}
    return replace(row, messages=[first, *row.messages])


def _nothing_left(source: str, rejects: list[Reject]) -> str:
    if not rejects:
        return f"{source} has no rows"
    first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
    return f"{source}: none of {len(rejects)} rows can be used. First reasons: {first}"
