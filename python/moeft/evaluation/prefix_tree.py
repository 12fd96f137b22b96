"""Token sequences as prefix trees: what several of them begin with stands in a row once.

S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Scored(NamedTuple):
    """Tokens, and which of them are scored, each given all before it."""

    tokens: tuple[int, ...]
    first: int
    """Index of the first token that is scored, at least 1; all behind it are too."""


@dataclass
class Tree:
    """Sequences in one row; the last token of each is only a label, so it takes no place."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Place of the token before each; -1 for a first token."""
    depths: list[int] = field(default_factory=list)
    edges: dict[tuple[int, int], int] = field(default_factory=dict)
    """Place and the token that is scored behind it -> number of the edge, from 0 in order."""
    sequences: dict[int, list[int]] = field(default_factory=dict)
    """Number of a sequence -> numbers of its edges."""

    def add(self, number: int, scored: Scored, path: list[int], shared: int) -> list[int]:
        """Add a sequence whose first ``shared`` places are those of ``path``; returns the places of its own."""
        path = path[:shared]
        for token in scored.tokens[shared:-1]:
            self.parents.append(path[-1] if path else -1)
            self.depths.append(len(path))
            path.append(len(self.tokens))
            self.tokens.append(token)
        pairs = zip(path[scored.first - 1 :], scored.tokens[scored.first :], strict=True)
        self.sequences[number] = [self.edges.setdefault(pair, len(self.edges)) for pair in pairs]
        return path

    def ancestors(self) -> NDArray[np.bool_]:
        """``[S, S]``: whether the column's token lies on the way to the row's, itself included."""
        seen_SS = np.eye(len(self.tokens), dtype=bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                seen_SS[place] |= seen_SS[parent]
        return seen_SS

    @property
    def is_chain(self) -> bool:
        """Whether no token has two followers, so that an ordinary causal mask does."""
        return self.parents == list(range(-1, len(self.tokens) - 1))


def trees(sequences: Sequence[Scored], row_tokens: int, share: bool = True) -> Iterator[Tree]:
    """Put all sequences into rows, those with a common beginning next to each other.

    Args:
        sequences: At least two tokens each.
        row_tokens: Tokens of a row that shares nothing. A row may be longer by three times what the next sequence
            shares with it, and a longer sequence has a row of its own.
        share: Whether a row may hold several sequences; without, every sequence is a row.
    """
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].tokens)
    tree = Tree()
    path: list[int] = []
    before: tuple[int, ...] = ()
    for number in order:
        scored = sequences[number]
        shared = _common_length(before, scored.tokens[:-1])
        # Attention costs a row's length squared, another row all that is shared: (1 + S / a) * S / (S - shared) is
        # least at S = shared + sqrt(shared * (shared + a)), which this line stays close to for a = 8 * row_tokens.
        room = row_tokens + 3 * shared
        if tree.sequences and (not share or len(tree.tokens) + len(scored.tokens) - 1 - shared > room):
            yield tree
            tree, shared = Tree(), 0
        path, before = tree.add(number, scored, path, shared), scored.tokens[:-1]
    if tree.sequences:
        yield tree


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
