"""Files of rows: one record at a time, whatever the kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeft.data.files.byte_stream import COMPRESSED
from moeft.data.files.csv_table import read_csv
from moeft.data.files.json_document import read_json_document
from moeft.data.files.json_lines import read_json_lines
from moeft.data.files.tables import read_parquet, read_saved_dataset
from moeft.errors import DataError

Record = tuple[int, Any]
"""Line or position, from 1, and the record: a mapping, or the ``DataError`` that says why it cannot be read."""

_READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_document,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def open_records(path: str | Path) -> Iterator[Record]:
    """Read the records of a file one by one, without holding the whole of it.

    Args:
        path: A file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv (these also with .gz, .zst or .bz2 behind)
            or .parquet, or a folder of ``datasets.save_to_disk``. A file with any other ending is read as JSON lines.

    Yields:
        Position and record. A record that cannot be read is a ``DataError`` in place of a mapping.

    Raises:
        DataError: If the file as a whole cannot be read; at once, or when the damage is reached.
        FileNotFoundError: If there is nothing at ``path``.
    """
    path = Path(path)
    if path.is_dir():
        return read_saved_dataset(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or folder", str(path))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    endings = [ending.lower() for ending in path.suffixes if ending.lower() not in COMPRESSED]
    return _READERS.get(endings[-1] if endings else "", read_json_lines)(path)
