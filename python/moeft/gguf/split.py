"""The files that a split model lies in."""

from __future__ import annotations

import re
from pathlib import Path

from moeft.errors import CheckpointError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def parts(file: str | Path) -> list[Path]:
    """All files of a model, in order: the file itself, unless its name is that of the first of several.

    Raises:
        CheckpointError: If the name is that of another part, or a part is missing.
    """
    file = Path(file)
    match = PART.fullmatch(file.name)
    if match is None:
        return [file]
    stem, number, count = match[1], int(match[2]), int(match[3])
    found = [file.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    if number != 1:
        raise CheckpointError(f"{file} is part {number} of {count}, expected the first; give {found[0]}")
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} is missing beside {file}; copy all parts of the model")
    return found
