"""Packs: several examples in one row of at most ``max_length`` tokens, so that little of a batch is padding.

Examples are packed once, before training, and the order of packs is shuffled every epoch. Which examples share a pack
does not matter to the loss, since attention stays inside each of them; only which ones share a step does. So a resumed
run needs nothing but the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from moeft.data.example import IGNORE_INDEX, Example, Examples


class Pack(TypedDict):
    """Examples one after the other; the arrays have one entry per token, int32."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    """Starts at 0 in each example, which is how models tell them apart."""


@dataclass(frozen=True)
class Packs(Sequence[Pack]):
    """Packs as lists of examples; a pack is put together when it is asked for."""

    examples: Sequence[Example]
    bins: list[list[int]]
    """Indices of the examples in each pack."""

    def __len__(self) -> int:
        return len(self.bins)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _concatenate([self.examples[i] for i in self.bins[index]])


@dataclass(frozen=True)
class Packed:
    """Packs in order, and how full they are."""

    packs: Packs
    num_tokens: int
    max_length: int

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a token, of ``max_length`` slots per pack."""
        return self.num_tokens / (len(self.packs) * self.max_length)

    def __str__(self) -> str:
        return f"{len(self.packs)} packs of {self.max_length} slots, {self.efficiency:.1%} full"


def pack(examples: Sequence[Example], max_length: int, seed: int = 0) -> Packed:
    """Pack examples by best-fit decreasing: longest first, each where it leaves the least room.

    Args:
        examples: From ``encode``, none longer than ``max_length``.
        max_length: Slots of a pack.
        seed: Shuffles examples of equal length, so that the order of a file does not decide what shares a pack.

    Raises:
        ValueError: If there is no example, or one does not fit; the message counts those.

    Source:
        Fewer Truncations Improve Language Modeling, https://arxiv.org/abs/2404.10830
    """
    lengths = _lengths(examples)
    too_long = sum(length > max_length for length in lengths)
    if too_long or not lengths:
        raise ValueError(
            f"{too_long} of {len(lengths)} examples are longer than max_length {max_length}, the longest has "
            f"{max(lengths, default=0)} tokens; encode them with this max_length first, or raise it"
        )
    return Packed(Packs(examples, _bins(lengths, max_length, seed)), sum(lengths), max_length)


def _bins(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # Bit r is set while some bin has room for r tokens: finds the tightest bin without a search tree.
    for index in order:
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            bin_ = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, bin_ = max_length, len(bins)
            bins.append([])
        bins[bin_].append(index)
        if room > length:
            with_room[room - length].append(bin_)
            rooms |= 1 << (room - length)
    return bins


def _lengths(examples: Sequence[Example]) -> list[int]:
    if isinstance(examples, Examples):
        return examples.lengths.tolist()
    return [len(example["input_ids"]) for example in examples]


def _concatenate(examples: Sequence[Example]) -> Pack:
    labels = np.concatenate([example["labels"] for example in examples], dtype=np.int32)
    starts = np.cumsum([0, *(len(example["labels"]) for example in examples[:-1])])
    # The token before an example's first is another example's last, which must not be trained to predict it.
    labels[starts] = IGNORE_INDEX
    return {
        "input_ids": np.concatenate([example["input_ids"] for example in examples], dtype=np.int32),
        "labels": labels,
        "position_ids": np.concatenate([np.arange(len(e["input_ids"]), dtype=np.int32) for e in examples]),
    }
