"""A few slots through which many layers pass: who is where, who may be overwritten, who comes next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeft.modules.streaming.copier import Copier, Pieces
from moeft.modules.streaming.order import upcoming

FEWEST_SLOTS = 2  # one in use, the next on its way


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Source:
    """A layer's bytes in host memory.

    Attributes:
        pieces: Offset in a slot and bytes of each piece.
        after_read: Called when they have been copied, on any thread; such as to give pages of a file back.
    """

    pieces: Pieces
    after_read: Callable[[], None] = _nothing

    @property
    def num_bytes(self) -> int:
        """Bytes that cross to the device."""
        return sum(piece.numel() for _, piece in self.pieces)


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    layer: int | None = None
    arrival: Any = None
    users: int = 0
    last_use: int = 0
    released: Any = None  # mark behind the last computation that used it


@dataclass
class Traffic:
    """What a ring has done: layers that were asked for, and copies of layers into slots."""

    borrowed: int = 0
    copied: int = 0
    copied_bytes: int = 0
    late: int = 0
    """Layers whose copy was begun only when they were asked for."""
    by_layer: dict[int, int] = field(default_factory=dict)


class Ring:
    """Slots on a device, and the layers that take turns in them.

    While a layer is borrowed its slot is not overwritten, whatever else is borrowed, and a slot is overwritten only
    behind all that was launched while it was lent. All computation must be launched on one stream of the device.

    Args:
        sources: The layers' bytes, in the order in which a forward pass uses them.
        copier: Moves them.
        slots: Number of slots, at least two; more look further ahead.

    Raises:
        ValueError: If there are no layers or too few slots.
    """

    def __init__(self, sources: Sequence[Source], copier: Copier, slots: int = FEWEST_SLOTS) -> None:
        if not sources or slots < FEWEST_SLOTS:
            raise ValueError(f"{len(sources)} layers for {slots} slots, expected a layer and at least {FEWEST_SLOTS}")
        self.sources = list(sources)
        self.copier = copier
        self.traffic = Traffic()
        ends = [offset + piece.numel() for source in sources for offset, piece in source.pieces]
        self.slot_bytes = max(ends)
        self._slots = [_Slot(copier.allocate(self.slot_bytes)) for _ in range(min(slots, len(sources)))]
        self._lock = threading.Lock()  # backward runs on a thread of autograd's
        self._current: int | None = None
        self._previous: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.memory.numel() for slot in self._slots)

    @contextmanager
    def borrow(self, layer: int) -> Iterator[Tensor]:
        """The bytes of a layer on the device, uint8 ``[slot_bytes]``, for what is launched inside the context.

        Raises:
            RuntimeError: If all slots are lent to other layers, or what the copy of this one raised.
        """
        slot = self._take(layer)
        try:
            self.copier.wait(slot.arrival)
        except BaseException:
            with self._lock:
                slot.users -= 1
                slot.layer = None
            raise
        try:
            yield slot.memory
        finally:
            with self._lock:
                slot.users -= 1
                slot.released = self.copier.mark()

    def close(self) -> None:
        """Finish all copies and give the slots up."""
        self.copier.close()
        self._slots.clear()

    def _take(self, layer: int) -> _Slot:
        with self._lock:
            if not self._slots:
                raise RuntimeError(f"streamed layer {layer} is wanted, and the stream is closed; load the model again")
            if layer != self._current:
                self._current, self._previous = layer, self._current
            coming = upcoming(layer, self._previous, len(self.sources), len(self._slots) - 1)
            slot = self._holding(layer)
            if slot is None:
                slot = self._free([layer, *coming]) or self._free([])
                if slot is None:
                    lent = sorted(slot.layer for slot in self._slots if slot.layer is not None)
                    raise RuntimeError(
                        f"streamed layer {layer} is wanted while all {len(self._slots)} slots are lent, to layers "
                        f"{lent}; layers must be used one after the other"
                    )
                self.traffic.late += 1
                self._fill(slot, layer)
            for other in coming:
                free = None if self._holding(other) else self._free([layer, *coming])
                if free is not None:
                    self._fill(free, other)
            self.traffic.borrowed += 1
            slot.last_use = self.traffic.borrowed
            slot.users += 1
            return slot

    def _holding(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _free(self, wanted: Sequence[int]) -> _Slot | None:
        """The slot that was used longest ago, of those that nobody uses and that hold no wanted layer."""
        free = [slot for slot in self._slots if not slot.users and (slot.layer is None or slot.layer not in wanted)]
        return min(free, key=lambda slot: slot.last_use, default=None)

    def _fill(self, slot: _Slot, layer: int) -> None:
        source = self.sources[layer]
        slot.layer = None  # of nobody, if the copy cannot be begun
        slot.arrival = self.copier.start(source.pieces, slot.memory, slot.released, source.after_read)
        slot.layer = layer
        self.traffic.copied += 1
        self.traffic.copied_bytes += source.num_bytes
        self.traffic.by_layer[layer] = self.traffic.by_layer.get(layer, 0) + 1
