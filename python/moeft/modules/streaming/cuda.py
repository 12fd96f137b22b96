"""What streaming asks of CUDA: registered host memory, a side stream, events. Not measured on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from moeft.modules.streaming.copier import Pieces
from moeft.modules.streaming.host_memory import HostMemory

Arrival = torch.cuda.Event | Future[torch.cuda.Event]


class CudaCopier:
    """Fills slots on a GPU from a stream of its own; the computation waits for it there, not on the host.

    Args:
        device: The GPU.
        memory: What all bytes lie in, kept until the last copy is made; None if they lie in files. If the GPU cannot
            read it by itself the driver stages copies, which blocks whoever asks: a thread of its own then, so that the
            host waits only where a layer is not yet on its way when it is needed.
    """

    def __init__(self, device: torch.device, memory: HostMemory | None) -> None:
        self.device = device
        self._memory = memory
        self._stream = torch.cuda.Stream(device)
        pinned = memory is not None and memory.is_pinned
        self._thread = None if pinned else ThreadPoolExecutor(1, "moeft-experts")

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory of a slot, uint8 ``[num_bytes]``."""
        slot = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # The allocator may have handed out memory that the computation still writes to, and gets it back only when
        # copies into it are over.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        slot.record_stream(self._stream)
        return slot

    def mark(self) -> torch.cuda.Event:
        """An event behind all that the current stream was given."""
        return torch.cuda.current_stream(self.device).record_event()

    def start(self, pieces: Pieces, slot: Tensor, after: torch.cuda.Event | None, done: Callable[[], None]) -> Arrival:
        """Begin to fill a slot."""
        if self._thread is None:
            return self._copy(pieces, slot, after, done)
        return self._thread.submit(self._copy, pieces, slot, after, done)

    def wait(self, arrival: Arrival) -> None:
        """Let the current stream wait for an arrival; the host too, where a thread has yet to ask for the copy."""
        event = arrival.result() if isinstance(arrival, Future) else arrival
        torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        """Wait until all copies are made, and take the registration of host memory back."""
        if self._thread is not None:
            self._thread.shutdown()
        self._stream.synchronize()
        if self._memory is not None:
            self._memory.close()

    def _copy(
        self, pieces: Pieces, slot: Tensor, after: torch.cuda.Event | None, done: Callable[[], None]
    ) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for offset, source in pieces:
                slot[offset : offset + source.numel()].copy_(source, non_blocking=True)
            done()
            return self._stream.record_event()


def register(address: int, num_bytes: int) -> str | None:
    """Let the GPU read a range of host memory by itself; why it cannot, or None."""
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(address, num_bytes, 0)
    if int(status) == 0:
        return None
    # The runtime would report this failure once more, for the next kernel that is launched.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
    return str(runtime.cudaGetErrorString(status))


def unregister(address: int) -> None:
    """Undo :func:`register`; the range must not be in use by a copy."""
    torch.cuda.cudart().cudaHostUnregister(address)
