"""How the packed tensors of a layer lie in one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeft.kernels.nf4 import NestedStatistics, NF4Weight

ALIGNMENT = 256  # bytes; no less than any allocator gives, so that kernels may read as wide as ever


class Place(NamedTuple):
    """Where a tensor lies in the run."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor as a view of a run of bytes, uint8 ``[n]``."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


class Image:
    """The layout of some packed weights in one run of bytes; the weights themselves are not kept.

    Args:
        weights: The weights, on any device.
    """

    def __init__(self, weights: Sequence[NF4Weight]) -> None:
        self.num_bytes = 0
        self._weights = [(weight.shape, weight.block_size, weight.codebook) for weight in weights]
        self.places = [[self._place(tensor) for tensor in tensors_of(weight)] for weight in weights]

    def _place(self, tensor: Tensor) -> Place:
        place = Place(self.num_bytes, tensor.shape, tensor.dtype)
        self.num_bytes += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
        return place

    def weights(self, memory: Tensor) -> list[NF4Weight]:
        """The weights as views of a run of bytes, uint8 ``[>= num_bytes]``, aligned as allocators do."""
        found = []
        for (shape, block_size, codebook), places in zip(self._weights, self.places, strict=True):
            packed, absmax, *nested = (place.of(memory) for place in places)
            statistics = NestedStatistics(*nested) if nested else None
            found.append(NF4Weight(packed, absmax, shape, block_size, statistics, codebook))
        return found

    def pieces(self, weights: Sequence[NF4Weight]) -> list[tuple[int, Tensor]]:
        """Offset and bytes, uint8 ``[n]``, of every tensor of weights of this layout, without a copy.

        Raises:
            ValueError: If a tensor has another shape or type than those that the layout was made of.
        """
        found = []
        for weight, places in zip(weights, self.places, strict=True):
            for tensor, place in zip(tensors_of(weight), places, strict=True):
                if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                    raise ValueError(
                        f"a tensor of a streamed layer is {tensor.dtype} {tuple(tensor.shape)}, expected {place.dtype} "
                        f"{tuple(place.shape)}"
                    )
                found.append((place.offset, tensor.contiguous().view(-1).view(torch.uint8)))
        return found


def tensors_of(weight: NF4Weight) -> list[Tensor]:
    """Tensors of a packed weight: codes, statistics, and those of the second level if there is one."""
    nested = [] if weight.nested is None else [weight.nested.absmax, weight.nested.offset]
    return [weight.packed, weight.absmax, *nested]
