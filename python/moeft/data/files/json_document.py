"""A JSON document: an array of rows, read record by record, or an object of columns.

An array that ends in the middle gives the records before that, and a last one that says what was lost.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moeft.data.files.byte_stream import open_bytes
from moeft.data.files.json_lines import read_json_lines
from moeft.errors import DataError

CHUNK_BYTES = 1 << 20
_DECODER = json.JSONDecoder()
_NEAR_END = 16
"""Characters of the longest literal or escape that a cut may split: an error this close to the end may be a cut."""


def read_json_document(path: Path) -> Iterator[tuple[int, Any]]:
    """Position and record of every row; see :func:`moeft.data.files.open_records`."""
    with open_bytes(path) as file:
        first = file.read(4096)
    start = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"[":
        return _read_array(path)
    if start == b"{":
        return _read_object(path)
    raise DataError(f"{path} begins with {first[:20]!r}, expected an array or an object of JSON")


class _Text:
    """The characters of a file from a position on, of which more can be had."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._num_bytes = 0
        self.buffer = ""

    def more(self) -> bool:
        """Append at least as much as there is, and at least a chunk; False at the end."""
        # As much again as there is: a record of any size is then parsed from its start only a few times.
        raw = self._file.read(max(CHUNK_BYTES, len(self.buffer)))
        try:
            self.buffer += self._decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} is not UTF-8 near byte {self._num_bytes + error.start + 1}; save it as UTF-8"
            ) from error
        self._num_bytes += len(raw)
        return bool(raw)

    def skip(self, characters: str, position: int) -> int:
        """First position from this one on that holds none of these characters; the end of the text if all do."""
        while True:
            rest = self.buffer[position : position + 64].lstrip(characters)
            found = min(len(self.buffer), position + 64) - len(rest)
            if rest or (found >= len(self.buffer) and not self.more()):
                return found
            position = found

    def drop(self, position: int) -> None:
        """Forget what stands before a position."""
        self.buffer = self.buffer[position:]


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as file:
        text = _Text(file, path)
        position = text.skip(" \t\r\n", 0) + 1
        for number in itertools.count(1):
            position = text.skip(" \t\r\n,", position)
            if text.buffer[position : position + 1] == "]":
                return
            if position >= len(text.buffer):
                yield number, DataError("the file ends without closing its array; more rows may be lost")
                return
            if position > CHUNK_BYTES:
                text.drop(position)
                position = 0
            record, end = _next_record(text, position, f"{path}: record {number}")
            yield number, record
            if end is None:
                return
            position = end


def _next_record(text: _Text, position: int, what: str) -> tuple[Any, int | None]:
    """The record at a position and where it ends; what was lost and None if the file ends inside of it."""
    while True:
        try:
            return _DECODER.raw_decode(text.buffer, position)
        except RecursionError:
            raise DataError(f"{what} is nested too deeply") from None
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Unterminated string") and error.pos < len(text.buffer) - _NEAR_END:
                near = text.buffer[max(0, error.pos - 20) : error.pos + 20]
                raise DataError(f"{what} is malformed JSON: {error.msg} near {near!r}") from error
            if not text.more():
                lost = len(text.buffer) - position
                return DataError(f"the file ends inside of this record, of which {lost} characters exist"), None


def _read_object(path: Path) -> Iterator[tuple[int, Any]]:
    """JSON lines under another name, one row, columns of equal length, or a key that holds the rows."""
    with open_bytes(path) as file:
        raw = file.read()
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{path} is malformed JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_json_lines(path)
        raise DataError(
            f"{path} is malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    return enumerate(_rows_of(document, path), start=1)


def _rows_of(document: Mapping[str, Any], path: Path) -> Iterator[Any] | list[Any]:
    columns = {key: value for key, value in document.items() if isinstance(value, list)}
    lengths = {len(column) for column in columns.values()}
    holding_rows = [column for column in columns.values() if column and all(isinstance(row, dict) for row in column)]
    if len(document) == 1 and holding_rows and not {"messages", "conversations"} & document.keys():
        return holding_rows[0]
    if len(columns) != len(document) or len(document) < 2:
        return [document]
    if len(lengths) != 1:
        sizes = ", ".join(f"{key} {len(column)}" for key, column in columns.items())
        raise DataError(f"{path} holds columns of unequal length: {sizes}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
