"""Log-probabilities under the reference on disk, so that no run computes what one before it has computed.

A file per reference, named by its context (:mod:`moeft.training.preference.reference_context`): a header, then records
of fixed size that are appended as they are known, each with its checksum. A kill loses at most the record that was
being written. Processes may share a file: they append under a lock. What cannot be read is not believed: a record whose
checksum is wrong is left out, and a file of another version or context is set aside.

==========  =====  ====================================================
header       8 B   ``MOEFTREF``
             4 B   version, little-endian as all numbers
            16 B   context
             4 B   CRC-32 of these
record      16 B   key: hash of the token ids and of which are compared
             8 B   sum of log-probabilities, float64
             4 B   compared tokens
             4 B   CRC-32 of these
==========  =====  ====================================================
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from moeft.data.example import IGNORE_INDEX, Example

VERSION = 1
MAGIC = b"MOEFTREF"
_HEADER = struct.Struct("<8sI16s")
_RECORD = struct.Struct("<16sdI")
_CRC = struct.Struct("<I")
HEADER_BYTES, RECORD_BYTES = _HEADER.size + _CRC.size, _RECORD.size + _CRC.size
logger = logging.getLogger(__name__)


def sequence_key(example: Example) -> bytes:
    """16 bytes that tell a sequence by its ids and by which of them are compared."""
    compared = np.asarray(example["labels"]) != IGNORE_INDEX
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(example["input_ids"], "<i4").tobytes())
    digest.update(np.packbits(compared).tobytes())
    return digest.digest()


class ReferenceCache:
    """The records of one reference.

    Args:
        folder: Of all references; made if absent.
        context: 32 hexadecimal digits that tell the reference.

    Attributes:
        path: The file.
        num_damaged: Records that were left out because their checksum was wrong or they made no sense.
    """

    def __init__(self, folder: str | Path, context: str) -> None:
        self.path = Path(folder) / f"{context}.ref"
        self._header = _with_crc(_HEADER.pack(MAGIC, VERSION, bytes.fromhex(context)))
        self._records: dict[bytes, tuple[float, int]] = {}
        self.num_damaged = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: bytes, count: int) -> float | None:
        """Sum of a sequence's log-probabilities; None if it is not known for so many compared tokens."""
        found = self._records.get(key)
        return found[0] if found is not None and found[1] == count else None

    def put(self, records: Iterable[tuple[bytes, float, int]]) -> None:
        """Append sums that are finite; they survive the process being killed right after.

        Raises:
            ValueError: If a sum is not finite.
            OSError: If the disk is full or read-only.
        """
        records = list(records)
        if bad := [total for _, total, _ in records if not math.isfinite(total)]:
            raise ValueError(f"a log-probability is {bad[0]}, which must not be kept")
        with self._locked() as file:
            size = file.seek(0, os.SEEK_END)
            torn = (size - HEADER_BYTES) % RECORD_BYTES
            if torn:
                file.truncate(size - torn)
            file.seek(0, os.SEEK_END)
            file.write(b"".join(_with_crc(_RECORD.pack(*record)) for record in records))
            file.flush()
        self._records |= {key: (total, count) for key, total, count in records}

    def discard(self) -> None:
        """Believe nothing of the file any more: set it aside and start anew."""
        self._set_aside("its values are not those of this reference")
        self._records = {}

    def _read(self) -> None:
        content = self.path.read_bytes()
        if content[:HEADER_BYTES] != self._header:
            self._set_aside("it is of another version or damaged")
            return
        for start in range(HEADER_BYTES, len(content) - RECORD_BYTES + 1, RECORD_BYTES):
            record = content[start : start + RECORD_BYTES]
            key, total, count = _RECORD.unpack_from(record)
            if record == _with_crc(record[: _RECORD.size]) and math.isfinite(total) and count:
                self._records[key] = (total, count)
            else:
                self.num_damaged += 1
        if self.num_damaged:
            logger.warning("%s: %d damaged records are computed anew", self.path, self.num_damaged)

    def _set_aside(self, reason: str) -> None:
        aside = self.path.with_suffix(".unreadable")
        logger.warning("%s is set aside as %s: %s", self.path, aside.name, reason)
        os.replace(self.path, aside)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file for this process alone, with its header."""
        while True:
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115  (closed below)
            with file:
                _lock(file)
                # Another process may have set the file aside while this one waited for it.
                if not self.path.exists() or os.fstat(file.fileno()).st_ino != self.path.stat().st_ino:
                    continue
                header = file.read(HEADER_BYTES)
                if not header:
                    file.write(self._header)
                elif header != self._header:
                    self._set_aside("it is of another version or damaged")
                    continue
                yield file
                return


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where a file is not to be shared.
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _with_crc(content: bytes) -> bytes:
    return content + _CRC.pack(zlib.crc32(content))
