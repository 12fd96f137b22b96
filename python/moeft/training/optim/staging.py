"""Gradients on their way from a device to the host, and weights on their way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LARGEST_BYTES = 256 << 20
"""Weights of more bytes take no pinned memory on their way back."""


class Staging:
    """Copies gradients to the host, each while the caller works on the one before, and sends weights back.

    Two slots of host memory take turns; each grows to the largest gradient. On CUDA they are pinned and copies run
    beside the host, on the stream that is current in the caller; on other devices copies block.
    """

    def __init__(self) -> None:
        self._slots = (_Slot(), _Slot())
        self._current = self._slots[0]

    def gradients(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        """Gradient of each parameter in host memory, valid until the next one is asked for.

        A gradient that lies in host memory is passed as it is.
        """
        for index, param in enumerate(params):
            if index == 0:
                self._slots[0].fetch(_gradient(param))
            if index + 1 < len(params):
                self._slots[(index + 1) % 2].fetch(_gradient(params[index + 1]))
            self._current = self._slots[index % 2]
            yield self._current.wait()

    def outgoing(self, param: Tensor) -> Tensor:
        """Host memory like a parameter, to write weights to that :meth:`send` takes; until the next gradient."""
        return self._current.outgoing(param)

    def send(self, weights: Tensor, param: Tensor) -> None:
        """Copy weights from host memory into a parameter on its device; they may change again afterwards."""
        self._current.send(weights, param)


class _Slot:
    """Host memory for one gradient, and for the weights that come of it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._gradient = self._memory
        self._arrived: torch.cuda.Event | None = None
        self._outgoing_memory = torch.empty(0, dtype=torch.uint8)
        self._outgoing: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def fetch(self, gradient: Tensor) -> None:
        """Start to copy a gradient; the slot's last one must not be in use any more."""
        self._outgoing = None
        if gradient.device.type == "cpu":
            self._gradient = gradient
            return
        is_cuda = gradient.device.type == "cuda"
        self._memory = _grown(self._memory, gradient.nbytes, is_cuda)
        self._gradient = _like(self._memory, gradient)
        self._gradient.copy_(gradient, non_blocking=is_cuda)
        if is_cuda:
            self._arrived = _event(gradient)

    def wait(self) -> Tensor:
        """The gradient, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._gradient

    def outgoing(self, param: Tensor) -> Tensor:
        """Host memory for new values of a parameter."""
        if self._outgoing is None:
            is_pinned = param.device.type == "cuda" and param.nbytes <= LARGEST_BYTES
            if is_pinned:
                if self._sent is not None:
                    self._sent.synchronize()  # what was written here last has left long ago
                    self._sent = None
                self._outgoing_memory = _grown(self._outgoing_memory, param.nbytes, True)
                self._outgoing = _like(self._outgoing_memory, param)
            else:
                self._outgoing = torch.empty_like(param, device="cpu")
        return self._outgoing

    def send(self, weights: Tensor, param: Tensor) -> None:
        """Copy weights into a parameter, out of pinned memory without a wait."""
        if param.device.type != "cuda" or param.nbytes > LARGEST_BYTES:
            param.copy_(weights)
            return
        outgoing = self.outgoing(param)
        if weights is not outgoing:
            outgoing.copy_(weights)
        param.copy_(outgoing, non_blocking=True)
        self._sent = _event(param)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad.detach().contiguous()


def _grown(memory: Tensor, num_bytes: int, is_pinned: bool) -> Tensor:
    """Memory of at least so many bytes: the one that is there, if it suffices."""
    enough = memory.numel() >= num_bytes
    return memory if enough else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)


def _like(memory: Tensor, tensor: Tensor) -> Tensor:
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _event(tensor: Tensor) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event
