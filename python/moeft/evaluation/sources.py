"""Where the rows of a task come from: a file, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.data.files import open_records
from moeft.data.files.tables import read_hub_dataset
from moeft.errors import DataError

Record = tuple[str, dict[str, Any]]
"""Position of a row in its source, from 1, as text, and the row."""


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub."""

    name: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name} ({self.config})"


def read_rows(task: str, file: Path | None, hub: Hub | None) -> list[Record]:
    """Rows of a file, or else of the hub's data set.

    Args:
        task: Its name, for messages.
        file: Any kind of file that :func:`moeft.data.files.open_records` reads; None takes the hub.
        hub: Where the data set is published; None if only files will do.

    Raises:
        DataError: If a file is missing, a row is damaged, or the hub cannot be reached; says where to get the rows.
    """
    where = f"{hub} on the Hugging Face hub has them" if hub else "docs/evaluation.md says where to get them"
    if file is not None:
        try:
            return _checked(task, open_records(file), str(file))
        except FileNotFoundError as error:
            raise DataError(f"task {task}: there is no {file}; {where}") from error
    if hub is None:
        raise DataError(f"task {task} needs a file of rows, {task}=FILE or --data FOLDER; {where}")
    return _checked(task, read_hub_dataset(hub.name, hub.split, config=hub.config), str(hub))


def _checked(task: str, records: Iterable[tuple[int, Any]], source: str) -> list[Record]:
    rows: list[Record] = []
    for line, record in records:
        if not isinstance(record, dict):
            # Leaving a row out would change the score without a word.
            raise DataError(f"task {task}: {source} row {line}: {record}")
        rows.append((str(line), record))
    return rows
