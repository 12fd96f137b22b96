"""Files that survive a kill: JSON replaced atomically, and a JSON-lines log that is only appended to."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.errors import RunFolderError


def to_json(value: Any) -> Any:
    """Plain JSON types of a value: NaN and infinity become null, paths text, NumPy and torch scalars numbers.

    Raises:
        TypeError: If a value has no JSON form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return to_json(value.item())
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, whatever happens in between.

    Raises:
        OSError: If the folder is missing, full or read-only; the old file is then untouched.
        TypeError: If a value has no JSON form.
    """
    text = json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: If it cannot be read.
        RunFolderError: If it is not JSON, with its line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}:{error.lineno}:{error.colno} is not JSON: {error.msg}") from error


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, handed to the system in a single write."""
    line = json.dumps(to_json(value), ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a missing file has none, a last line without its end was torn and is left out.

    Raises:
        RunFolderError: If a whole line is not a JSON object, with its number.
    """
    if not path.exists():
        return []
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RunFolderError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{path}:{number} holds {type(value).__name__}, expected an object")
        objects.append(value)
    return objects


def drop_torn_line(path: Path) -> None:
    """Cut a last line that has no end, so that the next append starts on a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
