"""Bytes of a file, decompressed if its name says so."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moeft.errors import DataError

COMPRESSED = (".gz", ".bz2", ".zst")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; .gz, .bz2 and .zst are decompressed on the way.

    Raises:
        DataError: If the file is not what its name says, is cut off, or begins as UTF-16 text does.
        OSError: If it cannot be opened.
    """
    suffix = path.suffix.lower()
    opened: Any = _OPENERS.get(suffix, open)(path, "rb")
    with opened as file:
        try:
            if file.peek(2)[:2] in _UTF16_MARKS:
                raise DataError(f"{path} is UTF-16 text, expected UTF-8; save it as UTF-8")
            yield file
        except (EOFError, zlib.error, OSError) as error:
            if suffix not in COMPRESSED:
                raise
            raise DataError(f"{path} is no {suffix} file, or a cut-off one: {error}") from error


class _Zstandard(io.RawIOBase):
    """A decompressed stream of pyarrow, which has no lines of its own."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._stream: Any = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".zst": lambda path, _: io.BufferedReader(_Zstandard(path), 1 << 16),
}
