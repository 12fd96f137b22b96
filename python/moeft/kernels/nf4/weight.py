"""A weight packed to 4 bits, with the statistics that bring it back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Codebook = Literal["nf4", "fp4"]  # the sixteen values; names as in bitsandbytes' quant_type
NESTED_BLOCK = 256  # absmax values that share one second-level statistic, as in bitsandbytes


@dataclass(frozen=True)
class NestedStatistics:
    """Second level of a double-quantised weight: ``absmax = code[codes] * absmax2 + offset``."""

    absmax: Tensor  # float32 [ceil(blocks / 256)], over the flattened absmax of the whole weight
    offset: Tensor  # float32 [1], mean of the first-level absmax


@dataclass(frozen=True)
class Layout:
    """How a weight is cut: ``groups`` runs of ``group_len`` elements, blocks restart with every group."""

    groups: int
    group_len: int
    block_size: int

    @classmethod
    def of(cls, shape: torch.Size | tuple[int, ...], block_size: int) -> Layout:
        """Layout of a weight: every leading index of a stack (3-D and up) is a group, anything else is one group."""
        groups = shape[0] if len(shape) > 2 else 1
        return cls(groups, math.prod(shape) // groups if groups else 0, block_size)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one group's packed codes, two elements each."""
        return -(-self.group_len // 2)

    @property
    def blocks(self) -> int:
        """Blocks of one group; the last may be short."""
        return -(-self.group_len // self.block_size)

    def packed_shape(self, stacked: bool) -> tuple[int, ...]:
        """Shape of the packed codes."""
        return (self.groups, self.packed_bytes) if stacked else (self.packed_bytes,)

    def absmax_shape(self, stacked: bool) -> tuple[int, ...]:
        """Shape of the first-level statistics."""
        return (self.groups, self.blocks) if stacked else (self.blocks,)


@dataclass(frozen=True)
class NF4Weight:
    """A 4-bit weight. The bytes are those of bitsandbytes, group by group.

    Attributes:
        packed: uint8, ``[ceil(n / 2)]``, or ``[E, ceil(n / 2)]`` for a stack of E experts of n elements each.
            Element 2i is the high nibble.
        absmax: float32 ``[blocks]`` or ``[E, blocks]``; uint8 codes of the same shape when ``nested`` is set.
        shape: Shape of the weight that was packed.
        block_size: Elements that share one absmax. A block never crosses an expert.
        nested: Second-level statistics of a double-quantised weight.
        codebook: The sixteen values that the codes stand for.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    block_size: int
    nested: NestedStatistics | None = None
    codebook: Codebook = "nf4"

    @property
    def layout(self) -> Layout:
        """How the weight is cut into groups and blocks."""
        return Layout.of(self.shape, self.block_size)

    @property
    def device(self) -> torch.device:
        """Device of the packed bytes."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and statistics together."""
        tensors = [self.packed, self.absmax]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.offset]
        return sum(t.numel() * t.element_size() for t in tensors)

    def experts(self, start: int, stop: int) -> NF4Weight:
        """Experts ``start`` to ``stop`` of a stack, as views of the same memory.

        Raises:
            ValueError: If the statistics are double-quantised: their blocks of 256 may cross experts. Restore them
                first with :func:`moeft.kernels.nf4.restore_absmax`.
        """
        if self.nested is not None:
            raise ValueError("a double-quantised weight cannot be cut, restore its absmax first")
        return replace(
            self,
            packed=self.packed[start:stop],
            absmax=self.absmax[start:stop],
            shape=torch.Size((stop - start, *self.shape[1:])),
        )
