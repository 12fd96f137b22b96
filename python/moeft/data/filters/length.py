"""Bounds in turns, characters and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moeft.config.filters import Length
from moeft.data.filters.filter import text_of

if TYPE_CHECKING:
    from moeft.data.rows import Row

CountTokens = Callable[[str], int]


class LengthFilter:
    """Leaves out rows that are too short or too long.

    Args:
        bounds: The recipe's section.
        count_tokens: Tokens of a text; needed only for bounds in tokens.

    Raises:
        ValueError: If tokens are bounded and nobody can count them.
    """

    name = "length"

    def __init__(self, bounds: Length, count_tokens: CountTokens | None = None) -> None:
        if (bounds.min_tokens, bounds.max_tokens) != (None, None) and count_tokens is None:
            raise ValueError("filters.length is bounded in tokens, and there is no tokenizer to count them")
        self._bounds = bounds
        self._measures: list[tuple[str, Callable[[Row], int], int | None, int | None]] = [
            ("turns", lambda row: len(row.messages), bounds.min_turns, bounds.max_turns),
            ("characters", lambda row: len(text_of(row)), bounds.min_characters, bounds.max_characters),
        ]
        if count_tokens is not None:
            count = count_tokens
            self._measures.append(("tokens", lambda row: count(text_of(row)), bounds.min_tokens, bounds.max_tokens))

    def reason(self, row: Row, place: str) -> str | None:
        """Which bound a row breaks, or None."""
        for unit, measure, fewest, most in self._measures:
            if fewest is None and most is None:
                continue
            size = measure(row)
            if fewest is not None and size < fewest:
                return f"{size} {unit}, at least {fewest} are wanted"
            if most is not None and size > most:
                return f"{size} {unit}, at most {most} are wanted"
        return None
