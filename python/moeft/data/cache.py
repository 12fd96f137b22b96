"""Encoded rows on disk, so that a second start does not tokenise again.

A folder ``<key>`` holds the arrays of the examples, which are mapped into memory, and ``cache.json`` with the rejects,
the counts of reading and a checksum of each file. The key is a hash of the rows or of their file, of the tokenizer with
its template, and of the options. A folder is written under another name, row by row, and renamed when it is whole, so
that of two processes one wins and neither sees half of it. One that is damaged is written anew.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.data.chat import Encoded
from moeft.data.example import ARRAYS, Examples, array_file
from moeft.data.rows import ReadSummary, Reject, Row, Rows
from moeft.data.tokens import fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 3
"""To be raised whenever rows come out otherwise than before."""

logger = logging.getLogger(__name__)


def file_key(path: str | Path) -> str:
    """Hash of the bytes of a file, or of all files of a folder, and of its path, which rejects name."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    parts = (part for file in files for part in (file.relative_to(path).as_posix(), _checksum(file)))
    return text_key(str(path), *parts)


def text_key(*parts: str) -> str:
    """Hash of some texts and of where each ends."""
    return _hash(*(part.encode() for part in parts))


def rows_key(rows: Rows) -> str:
    """Hash of everything in rows, and of what was rejected before, since the cache gives rejects back."""
    digest = _new_hash()
    digest.update(json.dumps(rows.source).encode() + b"\n")
    items: list[Row | Reject] = [*rows.rows, *rows.rejects]
    for item in items:
        digest.update(json.dumps(dataclasses.astuple(item), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def cache_key(content: str, tokenizer: "PreTrainedTokenizerFast", options: dict[str, Any]) -> str:
    """Name of the folder for rows with the hash ``content``, encoded in this way."""
    base: Any = tokenizer
    settings = json.dumps([VERSION, content, base.chat_template, base.special_tokens_map, options], default=str)
    return _hash(settings.encode(), fast_tokenizer(tokenizer).to_str().encode())


def cached(folder: str | Path, key: str, build: Callable[[Path], Encoded]) -> Encoded:
    """Encoded rows from the cache, or built and put there.

    Args:
        folder: Of all cached data sets; made if absent.
        key: From :func:`cache_key`.
        build: Encodes the rows into a folder. What it raises is passed on, and nothing is left of them.
    """
    place = Path(folder) / key
    if place.is_dir():
        found = _read(place)
        if found is not None:
            return found
        logger.warning("%s is damaged; its rows are encoded anew", place)
        shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.partial-", dir=place.parent))
    try:
        built = build(partial)
        _complete(built, partial)
        # It fails if another process was first, whose rows are the same.
        with contextlib.suppress(OSError):
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dataclasses.replace(built, examples=Examples.mapped(place))


def _complete(encoded: Encoded, folder: Path) -> None:
    """Write what the folder of the arrays lacks."""
    record = {
        "sums": {name: _checksum(array_file(folder, name)) for name in ARRAYS},
        "num_shortened": encoded.num_shortened,
        "read": None if encoded.read is None else dataclasses.asdict(encoded.read),
        "rejects": [dataclasses.astuple(reject) for reject in encoded.rejects],
    }
    with open(folder / "cache.json", "w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())


def _read(place: Path) -> Encoded | None:
    """What a folder holds; None if it is not whole."""
    try:
        record = json.loads((place / "cache.json").read_text("utf-8"))
        if any(_checksum(array_file(place, name)) != record["sums"][name] for name in ARRAYS):
            return None
        read = None if record["read"] is None else ReadSummary(**record["read"])
        rejects = [Reject(*reject) for reject in record["rejects"]]
        return Encoded(Examples.mapped(place), rejects, record["num_shortened"], read)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _hash(*parts: bytes) -> str:
    digest = _new_hash()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
