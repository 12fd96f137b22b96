"""Host memory for streamed layers: one run, registered with the device in chunks so that copies need no staging.

torch's pinned allocator is not used: it rounds every request up to a power of two, which for 12 GB may take 16.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20

Register = Callable[[int, int], str | None]
"""Address and bytes of a chunk -> None, or why the device does not take it."""


class HostMemory:
    """A run of host memory, which takes pages as they are written.

    Args:
        num_bytes: Its size.
        register: Makes a chunk known to the device; None for memory that stays pageable.
        unregister: Takes it back, by address.
        chunk_bytes: Size of a chunk.

    Attributes:
        bytes: The run, uint8 ``[num_bytes]``.
        obstacle: Why the memory is not pinned; None if it is, or nobody asked. No chunk is left registered then.
    """

    def __init__(
        self,
        num_bytes: int,
        register: Register | None = None,
        unregister: Callable[[int], None] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        # A chunk that shares a page with another cannot be registered beside it.
        whole = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
        self.bytes = whole[-whole.data_ptr() % mmap.PAGESIZE :][:num_bytes]
        self.chunk_bytes = chunk_bytes
        self.obstacle: str | None = None
        self._unregister = unregister
        self._registered: list[int] = []
        if register is not None:
            self._register(register)
        # Whoever forgets to close leaves no registration behind of memory that is used for something else.
        weakref.finalize(self, _take_back, self._registered, unregister)

    @property
    def is_pinned(self) -> bool:
        """Whether the device can read all of it by itself."""
        return bool(self._registered)

    def pieces(self, start: int, places: Sequence[tuple[int, int]]) -> list[tuple[int, Tensor]]:
        """Runs of a layer that begins at ``start``, none of which crosses a chunk: one copy takes one registration.

        Args:
            start: Of the layer.
            places: Offset in the layer and bytes of each tensor.

        Returns:
            Offset in the layer and bytes of each run.
        """
        found = []
        for offset, num_bytes in places:
            first, end = start + offset, start + offset + num_bytes
            while first < end:
                stop = min(end, (first // self.chunk_bytes + 1) * self.chunk_bytes)
                found.append((first - start, self.bytes[first:stop]))
                first = stop
        return found

    def close(self) -> None:
        """Take back what was registered; the bytes stay readable."""
        _take_back(self._registered, self._unregister)

    def _register(self, register: Register) -> None:
        start, total = self.bytes.data_ptr(), self.bytes.numel()
        for offset in range(0, total, self.chunk_bytes):
            self.obstacle = register(start + offset, min(self.chunk_bytes, total - offset))
            if self.obstacle is not None:
                self.close()
                return
            self._registered.append(start + offset)


def _take_back(registered: list[int], unregister: Callable[[int], None] | None) -> None:
    while registered:
        address = registered.pop()
        if unregister is not None:
            unregister(address)
