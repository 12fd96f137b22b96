"""Hold in host memory what autograd saves for backward on another device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES = 1 << 20  # Below this a copy costs more than the memory is worth.


class OnHost(NamedTuple):
    """A copy in host memory of a tensor that lives elsewhere."""

    copy: Tensor
    device: torch.device


def to_host(tensor: Tensor) -> Tensor | OnHost:
    """Copy a large tensor to pinned host memory; one that is small or there already stays as it is.

    The copy is queued on the tensor's stream, so memory that is freed behind it is reused only after it.
    """
    if _is_on_host(tensor) or tensor.nbytes < SMALLEST_BYTES:
        return tensor
    pinned = tensor.device.type == "cuda"
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return OnHost(copy.copy_(tensor, non_blocking=pinned), tensor.device)


def from_host(kept: Tensor | OnHost) -> Tensor:
    """The tensor that :func:`to_host` took, on its device again."""
    return kept if isinstance(kept, Tensor) else kept.copy.to(kept.device, non_blocking=kept.copy.is_pinned())


class offload_to_host(saved_tensors_hooks):  # noqa: N801  (a context manager, named as torch names its own)
    """While active, large tensors that autograd saves go to host memory until backward wants them.

    Args:
        layer: Its parameters and buffers stay where they are: they are not activations, and live anyway.
    """

    def __init__(self, layer: nn.Module) -> None:
        resident = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}

        def pack(tensor: Tensor) -> Tensor | OnHost:
            return tensor if tensor.untyped_storage().data_ptr() in resident else to_host(tensor)

        super().__init__(pack, from_host)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
