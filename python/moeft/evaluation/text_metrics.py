"""What can be counted in a text without judging it: words, variety, repetition, phrases of machine prose.

Source:
    Covington and McFall, Cutting the Gordian Knot: The Moving-Average Type-Token Ratio, 2010.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
MATTR_WINDOW = 50


def words(text: str) -> list[str]:
    """Words in lower case; apostrophes and hyphens inside belong to them, digits do not."""
    return [match.group().lower().replace("’", "'") for match in _WORD.finditer(text)]


def type_token_ratio(found: Sequence[str]) -> float:
    """Different words by words; falls with length, so compare only texts that are equally long."""
    return len(set(found)) / len(found)


def moving_average_ratio(found: Sequence[str], window: int = MATTR_WINDOW) -> float:
    """Mean type-token ratio of all windows of so many words, which does not depend on length.

    Args:
        found: Words, at least one; fewer than a window are one window of their own.
        window: Words of a window.
    """
    if len(found) <= window:
        return type_token_ratio(found)
    counts = Counter(found[:window])
    total = len(counts)
    for leaving, coming in zip(found, found[window:], strict=False):
        counts[coming] += 1
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        total += len(counts)
    return total / (len(found) - window + 1) / window


def trigrams(found: Sequence[str]) -> list[tuple[str, ...]]:
    """Every three words in a row."""
    return list(zip(found, found[1:], found[2:], strict=False))


def repeated_trigrams(found: Sequence[str]) -> tuple[int, int]:
    """Trigrams of a text that it has had before, and all of them."""
    every = trigrams(found)
    return len(every) - len(set(every)), len(every)


def shared_trigrams(texts: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """For each text its different trigrams that another text has too, and all its different ones."""
    own = [set(trigrams(text)) for text in texts]
    holders = Counter(trigram for of_text in own for trigram in of_text)
    return [(sum(holders[trigram] > 1 for trigram in of_text), len(of_text)) for of_text in own]


@dataclass(frozen=True)
class PhraseList:
    """Words and phrases to count."""

    phrases: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, lines: Iterable[str]) -> PhraseList:
        """A list from its entries; an entry without a word is left out."""
        return cls(frozenset(tuple(found) for line in lines if (found := words(line))))

    def count(self, found: Sequence[str]) -> int:
        """Places of a text where an entry begins; a place counts once, however many entries begin there."""
        sizes = sorted({len(phrase) for phrase in self.phrases})
        return sum(
            any(tuple(found[start : start + size]) in self.phrases for size in sizes) for start in range(len(found))
        )
