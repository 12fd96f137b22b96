"""Rows much like an earlier one, found by MinHash signatures of their runs of words.

Source:
    Broder, On the resemblance and containment of documents, 1997; LSH as in Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, chapter 3. The library is rensa.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeft.config.filters import NearDuplicates
from moeft.data.filters.filter import missing_extra, text_of, words_of

if TYPE_CHECKING:
    from moeft.data.rows import Row

SEED = 0


class NearDuplicatesFilter:
    """Leaves out rows whose estimated Jaccard similarity with an earlier one reaches the threshold.

    Raises:
        MissingExtraError: If rensa is not installed.
    """

    name = "near_duplicates"

    def __init__(self, settings: NearDuplicates) -> None:
        try:
            import rensa
        except ImportError as error:
            raise missing_extra(self.name, "rensa") from error
        self._new_signature = lambda: rensa.RMinHash(settings.permutations, SEED)
        self._settings = settings
        bands = _bands(settings.permutations, settings.threshold)
        self._index = rensa.RMinHashLSH(settings.threshold, settings.permutations, bands)
        self._kept: list[tuple[str, object]] = []

    def reason(self, row: Row, place: str) -> str | None:
        """Place of the most similar earlier row, or None."""
        signature = self._new_signature()
        signature.update(_runs(words_of(text_of(row)), self._settings.words))
        candidates = [(signature.jaccard(self._kept[index][1]), -index) for index in self._index.query(signature)]
        similarity, index = max(candidates, default=(0.0, 0))
        if similarity >= self._settings.threshold:
            return f"is {similarity:.0%} like {self._kept[-index][0]}"
        self._index.insert(len(self._kept), signature)
        self._kept.append((place, signature))
        return None


def _runs(words: list[str], length: int) -> list[str]:
    return [" ".join(words[start : start + length]) for start in range(max(1, len(words) - length + 1))]


def _bands(permutations: int, threshold: float) -> int:
    """Fewest bands with which a pair at the threshold shares one in 95 of 100 cases."""
    divisors = [bands for bands in range(1, permutations + 1) if permutations % bands == 0]
    return next(
        (bands for bands in divisors if 1 - (1 - threshold ** (permutations // bands)) ** bands >= 0.95), permutations
    )
