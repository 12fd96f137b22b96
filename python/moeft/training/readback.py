"""Numbers on their way from a device to the host, which asks for them when they have long arrived."""

from __future__ import annotations

import torch
from torch import Tensor


def reads_late(device: torch.device) -> bool:
    """Whether the host would wait for a number that was just computed there."""
    return device.type == "cuda"


class Readback:
    """Copies a few numbers behind the work that makes them, into host memory that is used again.

    On CUDA that memory is pinned and an event stands behind the copy, so only :meth:`read` can wait, and waits for no
    work but that before the copy. On other devices the copy blocks.
    """

    def __init__(self) -> None:
        self._host = torch.empty(0)
        self._arrived: torch.cuda.Event | None = None

    def send(self, values: Tensor) -> None:
        """Start to copy values; those sent before must have been read."""
        is_cuda = values.device.type == "cuda"
        if self._host.shape != values.shape or self._host.dtype != values.dtype:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_cuda)
        self._host.copy_(values, non_blocking=is_cuda)
        if is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The values sent last."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host.tolist()
