"""NF4 and FP4 on a GPU: launches of the Triton kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from moeft.kernels.nf4 import cpu, reference
from moeft.kernels.nf4.weight import Codebook, NF4Weight

SIZE = 4096  # elements of a program: 16 bytes of codes a thread, as many as one load brings
WARPS = 4


class PackedPointers(NamedTuple):
    """A packed weight as the kernels read it; the last two of a plain weight's statistics are None."""

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    dynamic_map: Tensor | None
    codes: Tensor

    @classmethod
    def of(cls, weight: NF4Weight) -> PackedPointers:
        """Pointers of a weight; contiguous, since it was checked or made by :func:`moeft.kernels.nf4.quantize`."""
        device, nested = weight.device, weight.nested
        codes = code_values(weight.codebook, device)
        if nested is None:
            return cls(weight.packed, weight.absmax, None, None, None, codes)
        return cls(weight.packed, weight.absmax, nested.absmax, nested.offset, _dynamic_map(device), codes)


def dequantize(weight: NF4Weight, out: Tensor, first: int = 0, stop: int | None = None) -> None:
    """Restore the groups ``first`` to ``stop`` of a weight, double-quantised or not, into ``out``, in one launch."""
    from moeft.kernels.nf4 import triton as kernels

    layout = weight.layout
    groups = (layout.groups if stop is None else stop) - first
    grid = (-(-layout.group_len // SIZE), groups)
    kernels.dequantize_kernel[grid](
        out,
        *PackedPointers.of(weight),
        first,
        GROUP_LEN=layout.group_len,
        BLOCK_SIZE=weight.block_size,
        SIZE=SIZE,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


# Cached: a tensor made from host values on every call would wait for the device.
@functools.cache
def code_values(codebook: Codebook, device: torch.device) -> Tensor:
    """The sixteen values of a codebook on a device, float32."""
    return reference.codes(codebook, device)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    return cpu.dynamic_map().to(device)
