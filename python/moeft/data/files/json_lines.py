"""JSON lines: one object per line, in UTF-8; a line that is not costs one row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeft.data.files.byte_stream import open_bytes
from moeft.errors import DataError


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and object of every line that is not blank; see :func:`moeft.data.files.open_records`."""
    # Bytes are decoded line by line, so that one bad byte costs one row; splitlines() would also split at U+2028.
    with open_bytes(path) as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield line, _parsed(raw, "utf-8-sig" if line == 1 else "utf-8")


def _parsed(raw: bytes, encoding: str) -> Any:
    try:
        return json.loads(raw.rstrip(b"\r\n").decode(encoding))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(f"malformed JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return DataError("malformed JSON: nested too deeply")
