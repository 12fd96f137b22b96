"""Fingerprints of inputs: cheap enough to take at every start, sensitive enough to notice another checkpoint."""

import hashlib
import os
from pathlib import Path
from typing import Any

_WHOLE_BYTES = 16 << 20
_WINDOWS = 16
_WINDOW_BYTES = 64 << 10


def fingerprint(path: Path) -> dict[str, Any]:
    """Fingerprint a file, or every file of a folder.

    Files up to 16 MiB are hashed whole. Of a larger file the length, the first 64 KiB, the last 64 KiB and 14 windows
    between are hashed, because two tunes of one base have equal safetensors headers and differ only in their data. A
    change of a few bytes inside a large file can go unnoticed.

    Args:
        path: File or folder. Hidden files and folders in it are left out.

    Returns:
        ``path`` (absolute), ``bytes`` and ``sha256``; of a folder over the relative names and hashes of its files.

    Raises:
        FileNotFoundError: If the path does not exist.
    """
    path = path.absolute()
    if path.is_dir():
        digest, size = hashlib.sha256(), 0
        for file in _visible_files(path):
            file_hash, file_bytes = _hash_file(file)
            digest.update(f"{file.relative_to(path).as_posix()}\0{file_bytes}\0{file_hash}\n".encode())
            size += file_bytes
        return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}
    file_hash, size = _hash_file(path)
    return {"path": str(path), "bytes": size, "sha256": file_hash}


def _visible_files(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _hash_file(path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(size.to_bytes(8, "little"))
            last = size - _WINDOW_BYTES
            for window in range(_WINDOWS):
                file.seek(last * window // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest(), size
