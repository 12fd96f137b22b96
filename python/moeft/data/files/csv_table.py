"""Comma- or tab-separated values whose first line names the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeft.data.files.byte_stream import open_bytes
from moeft.errors import DataError

FIELD_CHARACTERS = 1 << 27


def read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Line of its end and record of every row; an empty field is null. See :func:`moeft.data.files.open_records`."""
    csv.field_size_limit(FIELD_CHARACTERS)  # The default of 131,072 is less than a long conversation.
    delimiter = "\t" if ".tsv" in (ending.lower() for ending in path.suffixes) else ","
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path}: a column is named twice in {', '.join(header)}")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield reader.line_num, DataError(f"{len(fields)} fields, the header has {len(header)}")
                else:
                    yield reader.line_num, {key: field or None for key, field in zip(header, fields, strict=True)}
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is no CSV: {error}; are its quotes closed?") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 after line {reader.line_num}; save it as UTF-8") from error
