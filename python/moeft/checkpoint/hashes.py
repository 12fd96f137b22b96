"""SHA-256 of every tensor of a checkpoint, whatever its files; reads each byte once, without torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from moeft import _core

CHUNK_BYTES = 16 * 2**20


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Name of a tensor -> SHA-256 of its type, shape and bytes.

    Raises:
        CheckpointError: If the checkpoint is incomplete or damaged.
        OSError: If a file cannot be read.
    """
    # The core checks headers and lengths, so that the places below can be trusted.
    files = sorted({tensor["file"] for tensor in json.loads(_core.tensors(str(folder)))})
    return {name: digest for file in files for name, digest in _of_file(folder / file)}


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            digest = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
            file.seek(8 + length + start)
            for offset in range(start, end, CHUNK_BYTES):
                digest.update(file.read(min(CHUNK_BYTES, end - offset)))
            yield name, digest.hexdigest()
