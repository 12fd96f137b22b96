"""Names below a decoder layer: from a checkpoint on disk to memory, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeft.families import Family

PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_IN_LAYER = re.compile(r"(.*?\blayers\.\d+)\.(.+)")


def split(name: str) -> tuple[str, str] | None:
    """Path of the decoder layer and name below it; None for a tensor outside the layers."""
    match = _IN_LAYER.fullmatch(name)
    return (match[1], match[2]) if match else None


class DiskNames:
    """The table ``[disk]`` of a family, read in both directions.

    Args:
        family: The family; None for one that is unknown, whose names are the same in both places.
    """

    def __init__(self, family: Family | None) -> None:
        disk = family.disk if family else {}
        self._renames: list[tuple[str, str]] = [(on_disk, memory) for on_disk, memory in disk.get("renames", ())]
        self._templates: dict[str, str] = {
            part: disk[part] for parts in PARTS.values() for part in parts if part in disk
        }
        self._patterns = {
            part: re.compile(re.escape(template).replace(re.escape("{e}"), "([0-9]+)"))
            for part, template in self._templates.items()
        }

    def expert(self, below: str) -> tuple[str, int] | None:
        """Part ("gate", "up" or "down") and number of the expert, if a name on disk is that of one expert's tensor."""
        for part, pattern in self._patterns.items():
            if match := pattern.fullmatch(below):
                return part, int(match[1])
        return None

    def in_memory(self, below: str) -> str:
        """Name in memory of a tensor that is not one expert's; the first renaming that fits counts."""
        return _renamed(below, self._renames)

    def on_disk(self, below: str) -> str:
        """The reverse of :meth:`in_memory`."""
        return _renamed(below, [(memory, on_disk) for on_disk, memory in self._renames])

    def of_stack(self, stack: str, experts: int) -> Iterator[str]:
        """Names on disk of a stack whose experts lie one by one: all parts of the first expert, then of the second."""
        for expert in range(experts):
            for part in PARTS[stack]:
                yield self._templates[part].format(e=expert)


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
