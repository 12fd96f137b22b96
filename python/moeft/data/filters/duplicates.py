"""Rows whose words equal those of an earlier row."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeft.data.rows import Row


class DuplicatesFilter:
    """Leaves out rows that say, turn by turn, what an earlier one says; case and white space do not count."""

    name = "duplicates"

    def __init__(self) -> None:
        self._places: dict[bytes, str] = {}

    def reason(self, row: Row, place: str) -> str | None:
        """Place of the equal row, or None for the first of its kind."""
        digest = hashlib.blake2b(digest_size=16)
        for message in row.messages or [{"role": "text", "content": row.text or ""}]:
            turn = "\0".join((message["role"], *message["content"].lower().split(), repr(message.get("tool_calls"))))
            digest.update(turn.encode("utf-8", "surrogatepass") + b"\1")
        key = digest.digest()
        if key in self._places:
            return f"equals {self._places[key]}"
        self._places[key] = place
        return None
