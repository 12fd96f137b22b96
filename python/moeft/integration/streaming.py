"""Stream the packed experts of a model's layers through a few slots of a device, while the others stay there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moeft.errors import UnsupportedModelError
from moeft.integration.mapped_files import give_back
from moeft.kernels.nf4 import NF4Weight
from moeft.modules import NF4Experts
from moeft.modules.nf4_experts import STACKS
from moeft.modules.streaming import HostMemory, Image, Ring, RingLender, Source
from moeft.modules.streaming.copier import Copier, HostCopier
from moeft.modules.streaming.image import tensors_of
from moeft.modules.streaming.ring import FEWEST_SLOTS

Backing = Literal["host", "disk"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertStream:
    """What :func:`stream_experts` set up.

    Attributes:
        layers: Number of layers with experts.
        resident: Which of these, counted from 0, keep their experts on the device.
        ring: The slots.
        host_bytes: Host memory that streamed experts take; 0 from a file.
        modules: The streamed ones.
    """

    layers: int
    resident: tuple[int, ...]
    ring: Ring
    host_bytes: int
    modules: tuple[NF4Experts, ...]

    def close(self) -> None:
        """Let go of the slots; streamed layers compute where their bytes lie, in host memory, from then on."""
        for module in self.modules:
            module.stream_from(None)
        self.ring.close()


def stream_experts(
    model: nn.Module,
    device: torch.device | str,
    resident: int = 0,
    backing: Backing = "host",
    slots: int = FEWEST_SLOTS,
) -> ExpertStream:
    """Keep the packed experts of most layers off the device, and bring each layer's when it is computed with.

    Loss and gradients do not change. To be called while the model still lies in host memory; move it with ``model.to``
    afterwards, which leaves streamed experts where they are.

    Args:
        model: A model with packed experts in host memory, with or without adapters.
        device: Where the model is to compute.
        resident: Number of layers whose experts are moved with the model, spread evenly over the depth.
        backing: "host" copies streamed experts to host memory that the device reads by itself; "disk" leaves them where
            they are, which after :func:`moeft.load` of a packed checkpoint is its files: pages are read and given back.
        slots: Slots on the device, of the bytes of one layer's experts.

    Returns:
        The stream, to be closed when it is no longer needed.

    Raises:
        UnsupportedModelError: If the model has no packed experts, or the device is neither the CPU nor a CUDA GPU.
        ValueError: If there are not so many layers, streamed experts do not lie in host memory, or the backing is
            unknown.
    """
    device = _resolve(device)
    if backing not in get_args(Backing):
        raise ValueError(f"backing is {backing!r}, expected one of {', '.join(get_args(Backing))}")
    modules = [module for module in model.modules() if isinstance(module, NF4Experts)]
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no packed experts to stream; load it with quantization_config=NF4Config()"
        )
    if not 0 <= resident < len(modules):
        raise ValueError(f"resident is {resident}, expected 0 to {len(modules) - 1} of {len(modules)} layers")
    _require_in_host_memory(modules)
    staying = spread(resident, len(modules))
    streamed = [module for number, module in enumerate(modules) if number not in staying]
    images = [Image(_stacks(module)) for module in streamed]
    memory = None
    if backing == "host":
        memory = _host_memory(sum(image.num_bytes for image in images), device)
        sources = _copied(streamed, images, memory)
    else:
        sources = [_in_place(module, image) for module, image in zip(streamed, images, strict=True)]
    ring = Ring(sources, _copier(device, memory), slots)
    for number, (module, image) in enumerate(zip(streamed, images, strict=True)):
        module.stream_from(RingLender(ring, number, image))
    host_bytes = 0 if memory is None else memory.bytes.numel()
    return ExpertStream(len(modules), staying, ring, host_bytes, tuple(streamed))


def streamed_tensors(model: nn.Module) -> list[Tensor]:
    """Packed tensors of the experts of a model that are streamed, in host memory or in files."""
    streamed = [m for m in model.modules() if isinstance(m, NF4Experts) and m.lender is not None]
    return [tensor for module in streamed for weight in _stacks(module) for tensor in tensors_of(weight)]


def streamed_bytes(model: nn.Module) -> int:
    """Bytes of the experts of a model that are streamed."""
    return sum(tensor.nbytes for tensor in streamed_tensors(model))


def slot_bytes(model: nn.Module) -> int:
    """Bytes of the slots on the device through which a model's experts are streamed."""
    lenders = (module.lender for module in model.modules() if isinstance(module, NF4Experts))
    return sum(ring.num_bytes for ring in {lender.ring for lender in lenders if isinstance(lender, RingLender)})


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` layers, evenly over the depth: what stays gives the transfers between it time.

    >>> spread(2, 6)
    (1, 4)
    """
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def _resolve(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"experts are streamed to a CUDA GPU or the CPU, not to {device}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _require_in_host_memory(modules: Sequence[NF4Experts]) -> None:
    for module in modules:
        if module.lender is not None:
            raise ValueError("the model's experts are streamed already; close that stream first")
        device = getattr(module, STACKS[0]).device
        if device.type != "cpu":
            raise ValueError(
                f"experts lie on {device}, expected host memory, from which they are streamed; load the model without "
                "a device, stream its experts, and move it then"
            )


def _host_memory(num_bytes: int, device: torch.device) -> HostMemory:
    if device.type != "cuda":
        return HostMemory(num_bytes)
    from moeft.modules.streaming import cuda

    memory = HostMemory(num_bytes, cuda.register, cuda.unregister)
    if memory.obstacle is not None:
        _logger.warning(
            "%d MiB of host memory cannot be registered with the GPU (%s); experts are copied through buffers of the "
            "driver, which is slower: free host memory, raise the limit of locked memory, or keep more layers resident",
            num_bytes >> 20,
            memory.obstacle,
        )
    return memory


def _stacks(module: NF4Experts) -> list[NF4Weight]:
    return [module.packed_weight(stack) for stack in STACKS]


def _copied(modules: Sequence[NF4Experts], images: Sequence[Image], memory: HostMemory) -> list[Source]:
    """Move experts to the run of host memory, layer by layer; modules share it from then on."""
    sources, start = [], 0
    for module, image in zip(modules, images, strict=True):
        run = memory.bytes[start : start + image.num_bytes]
        pieces = image.pieces(_stacks(module))
        for offset, piece in pieces:
            run[offset : offset + piece.numel()] = piece
        give_back(piece for _, piece in pieces)
        for name, weight in zip(STACKS, image.weights(run), strict=True):
            module.set_packed(name, weight)
        places = [(place.offset, place.num_bytes) for places in image.places for place in places]
        sources.append(Source(memory.pieces(start, places)))
        start += image.num_bytes
    return sources


def _in_place(module: NF4Experts, image: Image) -> Source:
    """Experts where they are; the pages of a file are given back when they were read."""
    pieces = image.pieces(_stacks(module))
    return Source(pieces, lambda: give_back(piece for _, piece in pieces))


def _copier(device: torch.device, memory: HostMemory | None) -> Copier:
    if device.type == "cpu":
        return HostCopier()
    from moeft.modules.streaming.cuda import CudaCopier

    return CudaCopier(device, memory)
