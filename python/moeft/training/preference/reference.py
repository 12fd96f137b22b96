"""Log-probabilities of pairs under the reference: from the cache, and the rest computed once, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeft.data.example import IGNORE_INDEX
from moeft.data.pairs import EncodedPairs, Pair, Pairs
from moeft.data.rejects import Reject
from moeft.errors import DataError
from moeft.progress_bar import Callback
from moeft.training.preference.reference_cache import ReferenceCache, sequence_key
from moeft.training.preference.scores import PairScores

logger = logging.getLogger(__name__)
Score = Callable[[Sequence[Pair]], PairScores]


def tolerance(dtype: torch.dtype) -> float:
    """Nats per token by which a cached log-probability may differ from a new one: batches differ in their padding."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.05)


@dataclass(frozen=True)
class ReferenceReport:
    """How the log-probabilities under the reference came about, in sequences: two for each pair."""

    cached: int
    computed: int
    verified: int
    """Of the cached ones, how many were computed again and compared."""
    not_finite: tuple[int, ...] = ()
    """Places of pairs with a log-probability that is not finite; they are in no cache."""

    def __str__(self) -> str:
        return f"reference: {self.cached} sequences from the cache, {self.verified} verified, {self.computed} computed"


class ReferenceMismatchError(Exception):
    """A cached value is not what the reference gives now."""


@dataclass(frozen=True)
class Reference:
    """Computes and keeps log-probabilities under the reference.

    Args:
        score: Scores some pairs under the reference.
        batch_size: Pairs at a time.
        cache: Where they are kept; None keeps nothing.
        verify: Cached pairs to compute again.
        tolerance: Largest difference in nats per token between a cached value and a new one.
    """

    score: Score
    batch_size: int
    cache: ReferenceCache | None
    verify: int
    tolerance: float

    def log_probs(self, pairs: Pairs, advance: Callback | None = None) -> tuple[NDArray[np.float64], ReferenceReport]:
        """``[N, 2]`` sums of all pairs, and where they came from.

        A cache whose values are not those of this reference, which its name should have told, is set aside and
        computed anew.
        """
        sums = self._cached(pairs)
        num_verified = 0
        known = np.flatnonzero(~np.isnan(sums).any(1))
        if self.cache is not None and self.verify and len(known):
            try:
                num_verified = self._check(pairs, known, sums)
            except ReferenceMismatchError:
                self.cache.discard()
                sums[:] = np.nan
        num_cached = int((~np.isnan(sums)).sum())
        missing = np.flatnonzero(np.isnan(sums).any(1))
        # Sequences of like length share a batch, so that little is spent on padding.
        lengths = pairs.chosen.lengths + pairs.rejected.lengths
        order = missing[np.argsort(lengths[missing], kind="stable")]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            computed = self._compute(pairs, rows)
            self._keep(pairs, rows, np.where(np.isnan(sums[rows]), computed, np.nan))
            sums[rows] = np.where(np.isnan(sums[rows]), computed, sums[rows])
            if advance is not None:
                advance(start + len(rows), len(order), "pairs")
        not_finite = np.flatnonzero(~np.isfinite(sums).all(1)).tolist()
        return sums, ReferenceReport(num_cached, 2 * len(pairs) - num_cached, num_verified, tuple(not_finite))

    def _keep(self, pairs: Pairs, rows: NDArray[np.int64], computed: NDArray[np.float64]) -> None:
        """Put those of ``[B, 2]`` sums into the cache that are finite."""
        if self.cache is None:
            return
        records = []
        for place, side in np.argwhere(np.isfinite(computed)).tolist():
            key, count = _key(pairs[int(rows[place])], side)
            records.append((key, float(computed[place, side]), count))
        self.cache.put(records)

    def _cached(self, pairs: Pairs) -> NDArray[np.float64]:
        """``[N, 2]`` sums that the cache has, and NaN."""
        if self.cache is None:
            return np.full((len(pairs), 2), np.nan)
        cache = self.cache
        found = [[cache.get(*_key(pair, side)) for side in range(2)] for pair in pairs]
        return np.array([[np.nan if value is None else value for value in row] for row in found])

    def _check(self, pairs: Pairs, known: NDArray[np.int64], sums: NDArray[np.float64]) -> int:
        """Compute some cached pairs again, evenly over the data set."""
        places = np.unique(np.linspace(0, len(known) - 1, min(self.verify, len(known))).round().astype(int))
        rows = known[places]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            counts = np.array([[_key(pairs[int(row)], side)[1] for side in range(2)] for row in batch])
            difference = np.abs(self._compute(pairs, batch) - sums[batch]) / counts
            if not (difference <= self.tolerance).all():
                raise ReferenceMismatchError
        return 2 * len(rows)

    def _compute(self, pairs: Pairs, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        with torch.no_grad():
            sums_B2: Any = self.score([pairs[int(row)] for row in rows]).sums
        return sums_B2.double().cpu().numpy()


def with_reference(
    encoded: EncodedPairs, reference: Reference, advance: Callback | None = None
) -> tuple[EncodedPairs, ReferenceReport]:
    """Pairs with their log-probabilities; those with one that is not finite are left out and join the rejects.

    Raises:
        DataError: If none is left.
    """
    sums, report = reference.log_probs(encoded.pairs, advance)
    pairs = encoded.pairs.with_reference(sums)
    if not report.not_finite:
        return replace(encoded, pairs=pairs), report
    rejects = [
        Reject(int(pairs.lines[row]), f"its log-probability under the reference is {sums[row].tolist()}", "pairs")
        for row in report.not_finite
    ]
    kept = np.setdiff1d(np.arange(len(pairs)), report.not_finite)
    if not len(kept):
        raise DataError(f"no pair has a finite log-probability under the reference; first: {rejects[0].reason}")
    logger.warning("%d pairs are left out: their log-probability under the reference is not finite", len(rejects))
    return replace(encoded, pairs=pairs.take(kept), rejects=[*encoded.rejects, *rejects]), report


def _key(pair: Pair, side: int) -> tuple[bytes, int]:
    """Key of one answer's sequence, and its compared tokens."""
    example = pair["chosen"] if side == 0 else pair["rejected"]
    return sequence_key(example), int((example["labels"][1:] != IGNORE_INDEX).sum())
