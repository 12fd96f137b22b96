"""Sizes in bytes: read from what people write, shown as they read."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(size: str | int) -> int:
    """Bytes of ``16GiB`` (binary), ``16GB`` (decimal), ``16g`` (binary, as graphics cards are sold) or a plain number.

    Raises:
        ValueError: If it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"{size!r} is not a size in bytes, expected one such as 16GiB, 16GB, 16g or 17179869184")
    return round(float(match[1]) * unit)


def format_bytes(size: float) -> str:
    """``14.30 GiB``, ``64.0 MiB``, ``512 B``."""
    for unit, digits in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        scale = UNITS[unit.lower()[0]]
        if abs(size) >= scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size:.0f} B"
