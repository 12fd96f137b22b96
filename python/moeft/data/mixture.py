"""How many rows of each source an epoch has, and in which order.

The order is a list made once from the seed. Training shuffles that list anew every epoch, by a seed of its own, so a
resumed run meets the rows that one without a stop meets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from moeft.errors import DataError


@dataclass(frozen=True)
class Share:
    """How much of a source is used; the keys of a recipe's source."""

    name: str
    size: int
    """Rows that the source has."""
    weight: float | None = None
    rows: int | None = None
    epochs: float = 1.0


def rows_of_epoch(shares: Sequence[Share]) -> list[int]:
    """Rows that each source gives to an epoch.

    A source without a weight gives ``rows``, or all of its rows ``epochs`` times. Sources with weights give as many as
    they can in the proportion of these, until one of them would be repeated more than ``epochs`` times.

    Raises:
        DataError: If no row is left, or a source with a positive weight would give none.
    """
    counts = [
        share.rows if share.rows is not None else round(share.size * share.epochs) if share.weight is None else 0
        for share in shares
    ]
    weighted = [(index, share) for index, share in enumerate(shares) if share.weight]
    if not weighted and not sum(counts):
        raise DataError(
            f"the weights of {', '.join(share.name for share in shares)} are all 0; nothing is left to train on"
        )
    if weighted:
        rows_per_weight = min(share.size * share.epochs / (share.weight or 1) for _, share in weighted)
        for index, share in weighted:
            counts[index] = math.floor(rows_per_weight * (share.weight or 0) + 1e-9)
            if not counts[index]:
                raise DataError(
                    f"source {share.name} has weight {share.weight:g}, which is less than one row beside the others; "
                    "raise it, or set it to 0"
                )
    return counts


def interleave(sizes: Sequence[int], counts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Order of an epoch: source and row of every place.

    Every part of the list has the sources in about the proportion of the whole. A source is gone through in a random
    order, anew for each repetition, so no row comes a second time before every row came once.

    Args:
        sizes: Rows that each source has.
        counts: Rows that each source gives.
        seed: Decides the orders.
    """
    places: list[tuple[float, int, int]] = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        offset = random.Random(f"{seed}:{source}").random()
        rows = (row for epoch in range(-(-count // size)) for row in _shuffled(size, f"{seed}:{source}:{epoch}"))
        places += [((index + offset) / count, source, row) for index, row in zip(range(count), rows, strict=False)]
    places.sort(key=lambda place: place[:2])
    return [(source, row) for _, source, row in places]


def _shuffled(size: int, seed: str) -> list[int]:
    # Python promises to keep the sequence of Random.random() between versions, not that of shuffle().
    uniform = random.Random(seed).random
    keys = [uniform() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)
