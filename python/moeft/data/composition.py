"""What a training set is made of: rows and tokens by source, and mixing the encoded sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeft.data.chat import Encoded
from moeft.data.mixture import Share, interleave, rows_of_epoch

if TYPE_CHECKING:
    from moeft.config.sources import Source


@dataclass(frozen=True)
class Part:
    """What one source gives to an epoch."""

    name: str
    formats: dict[str, int]
    filtered: dict[str, int]
    """Rows left out, by filter."""
    available: int
    """Rows that can be trained on, after rejects, filters and splitting."""
    rejected: int
    """Rows that could not be read, were filtered or did not fit."""
    rows: int
    """Rows in an epoch."""
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Composition:
    """The sources of a training set. ``str()`` is a table."""

    parts: list[Part]

    def to_json(self) -> list[dict[str, Any]]:
        """One object per source, with its shares of rows and of trained tokens."""
        return [
            asdict(part)
            | {
                "share_of_rows": _share(part.rows, self._total("rows")),
                "share_of_trained_tokens": _share(part.trained_tokens, self._total("trained_tokens")),
            }
            for part in self.parts
        ]

    def __str__(self) -> str:
        header = ("source", "format", "rejected", "available", "rows", "tokens", "trained", "of rows", "of trained")
        lines = [
            (
                part.name,
                "+".join(part.formats),
                *(
                    f"{number:,}"
                    for number in (part.rejected, part.available, part.rows, part.tokens, part.trained_tokens)
                ),
                f"{_share(part.rows, self._total('rows')):.1%}",
                f"{_share(part.trained_tokens, self._total('trained_tokens')):.1%}",
            )
            for part in self.parts
        ]
        return _table([header, *lines])

    def _total(self, name: str) -> int:
        return sum(getattr(part, name) for part in self.parts)


def compose(sources: Sequence[Source], encoded: Sequence[Encoded], seed: int) -> tuple[Encoded, Composition]:
    """One training set of several encoded sources.

    Sources that are all used whole and once keep their order, one after the other; otherwise they are interleaved.

    Args:
        sources: Of the recipe.
        encoded: Their rows as tokens.
        seed: Of the order.

    Raises:
        DataError: If the weights leave nothing.
    """
    sizes = [len(part.examples) for part in encoded]
    joined = Encoded.join(encoded)
    counts = sizes
    owners = np.repeat(np.arange(len(sizes)), sizes)
    if any(source.is_mixed for source in sources):
        shares = [
            Share(source.label, size, source.weight, source.rows, source.epochs)
            for source, size in zip(sources, sizes, strict=True)
        ]
        counts = rows_of_epoch(shares)
        owners, rows = np.array(interleave(sizes, counts, seed)).T
        joined = replace(joined, examples=joined.examples.take(np.cumsum([0, *sizes])[owners] + rows))
    tokens, trained = (
        np.bincount(owners, lengths, len(sizes)).astype(int).tolist()
        for lengths in (joined.examples.lengths, joined.examples.trained_lengths)
    )
    parts = [
        Part(source.label, *_kinds(part), size, len(part.rejects), count, *figures)
        for source, part, size, count, *figures in zip(sources, encoded, sizes, counts, tokens, trained, strict=True)
    ]
    return joined, Composition(parts)


def _kinds(encoded: Encoded) -> tuple[dict[str, int], dict[str, int]]:
    """Rows by format and by filter."""
    return ({}, {}) if encoded.read is None else (dict(encoded.read.formats), dict(encoded.read.filtered))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
