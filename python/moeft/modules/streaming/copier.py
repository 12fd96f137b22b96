"""Copies between host memory and slots, on a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Pieces = Sequence[tuple[int, Tensor]]
"""Offset in a slot and bytes, uint8 ``[n]`` in host memory."""


class Copier(Protocol):
    """Moves bytes into slots beside the computation, in the order in which it is asked to."""

    device: torch.device

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory of a slot, uint8 ``[num_bytes]``."""

    def mark(self) -> Any:
        """A point in the computation, behind all that was launched so far."""

    def start(self, pieces: Pieces, slot: Tensor, after: Any, done: Callable[[], None]) -> Any:
        """Begin to fill a slot, not before the computation has passed the mark ``after`` (None: at once).

        ``done`` is called once the host bytes have been read, on any thread. Returns the arrival.
        """

    def wait(self, arrival: Any) -> None:
        """Let the computation that is launched from now on wait for an arrival; raises what went wrong with it."""

    def close(self) -> None:
        """Finish what was begun, and take no more."""


class HostCopier:
    """Fills slots in host memory: for layers in a file, and where there is no GPU.

    Kernels on the CPU have finished when they return, so there is nothing to mark.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "moeft-experts")

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory of a slot, uint8 ``[num_bytes]``; torch aligns it to 64 bytes."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> None:
        """Nothing."""

    def start(self, pieces: Pieces, slot: Tensor, after: None, done: Callable[[], None]) -> Future[None]:
        """Begin to fill a slot."""
        return self._thread.submit(self._copy, pieces, slot.numpy(), done)

    @staticmethod
    def _copy(pieces: Pieces, slot: np.ndarray, done: Callable[[], None]) -> None:
        for offset, source in pieces:
            # Without torch, whose threads would be taken from the computation.
            np.copyto(slot[offset : offset + source.numel()], source.numpy())
        done()

    def wait(self, arrival: Future[None]) -> None:
        """Block until a slot is filled."""
        arrival.result()

    def close(self) -> None:
        """Finish what was begun."""
        self._thread.shutdown()
