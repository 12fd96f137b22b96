"""Gradients on their way from a device to the host, and weights on their way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Staging:
    """Copies gradients to the host, each while the caller works on the one before, and sends weights back.

    Two slots of host memory take turns; each grows to the largest gradient. On CUDA they are pinned and copies run
    beside the host, on the stream that is current in the caller; on other devices copies block.
    """

    def __init__(self) -> None:
        self._slots = (_Slot(), _Slot())

    def gradients(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        """Gradient of each parameter in host memory, valid until the next one is asked for.

        A gradient that lies in host memory is passed as it is.
        """
        for index, param in enumerate(params):
            if index == 0:
                self._slots[0].fetch(_gradient(param))
            if index + 1 < len(params):
                self._slots[(index + 1) % 2].fetch(_gradient(params[index + 1]))
            yield self._slots[index % 2].wait()

    @staticmethod
    def send(weights: Tensor, param: Tensor) -> None:
        """Copy weights from host memory into a parameter on its device.

        Blocks until ``weights`` may change again: they are pageable memory that the next step writes to.
        """
        param.copy_(weights)


class _Slot:
    """Host memory for one gradient."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._gradient = self._memory
        self._arrived: torch.cuda.Event | None = None

    def fetch(self, gradient: Tensor) -> None:
        """Start to copy a gradient; the slot's last one must not be in use any more."""
        if gradient.device.type == "cpu":
            self._gradient = gradient
            return
        is_cuda = gradient.device.type == "cuda"
        nbytes = gradient.numel() * gradient.element_size()
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._gradient = self._memory[:nbytes].view(gradient.dtype).view(gradient.shape)
        self._gradient.copy_(gradient, non_blocking=is_cuda)
        if is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(gradient.device))

    def wait(self) -> Tensor:
        """The gradient, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._gradient


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad.detach().contiguous()
