"""NF4 and FP4 on the CPU: tensors handed to the Rust core as buffers, without a copy."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeft import _core
from moeft.kernels.dtypes import NAMES
from moeft.kernels.nf4.weight import NESTED_BLOCK, Codebook, Layout, NF4Weight

if TYPE_CHECKING:
    import numpy as np


def quantize(values: Tensor, layout: Layout, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """As :func:`moeft.kernels.nf4.reference.quantize`, bit for bit."""
    packed = torch.empty(layout.groups, layout.packed_bytes, dtype=torch.uint8)
    absmax = torch.empty(layout.groups, layout.blocks, dtype=torch.float32)
    _core.nf4_quantize(
        buffer(values),
        NAMES[values.dtype],
        layout.groups,
        layout.group_len,
        layout.block_size,
        codebook,
        packed.view(-1).numpy(),
        absmax.view(-1).numpy(),
        torch.get_num_threads(),
    )
    return packed, absmax


def dequantize(weight: NF4Weight, out: Tensor) -> None:
    """Restore a weight, double-quantised or not, into ``out``."""
    layout, nested = weight.layout, weight.nested
    _core.nf4_dequantize(
        buffer(weight.packed.contiguous()),
        buffer(weight.absmax.contiguous()),
        None if nested is None else buffer(nested.absmax.contiguous()),
        0.0 if nested is None else float(nested.offset),
        layout.groups,
        layout.group_len,
        layout.block_size,
        weight.codebook,
        buffer(out),
        NAMES[out.dtype],
        torch.get_num_threads(),
    )


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack first-level statistics: uint8 codes, float32 ``absmax2`` [ceil(n / 256)], float32 ``offset`` [1]."""
    codes = torch.empty(absmax.shape, dtype=torch.uint8)
    absmax2 = torch.empty(-(-absmax.numel() // NESTED_BLOCK), dtype=torch.float32)
    offset = _core.nf4_nest(absmax.contiguous().view(-1).numpy(), codes.view(-1).numpy(), absmax2.numpy())
    return codes, absmax2, torch.tensor([offset], dtype=torch.float32)


def unnest(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """As :func:`moeft.kernels.nf4.reference.restore_absmax`, bit for bit."""
    out = torch.empty(codes.shape, dtype=torch.float32)
    _core.nf4_unnest(codes.contiguous().view(-1).numpy(), absmax2.numpy(), float(offset), out.view(-1).numpy())
    return out


def first_non_finite(values: Tensor) -> int | None:
    """Flat position of the first NaN or infinity."""
    return _core.nf4_first_non_finite(buffer(values), NAMES[values.dtype])


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit code, float32, ascending."""
    codes = torch.arange(256, dtype=torch.uint8)
    return unnest(codes, torch.ones(1), torch.zeros(1))


def buffer(tensor: Tensor) -> np.ndarray:
    """A flat view of a contiguous tensor that numpy can name: 16-bit floats as uint16."""
    flat = tensor.detach().view(-1)
    return (flat.view(torch.uint16) if flat.dtype in (torch.bfloat16, torch.float16) else flat).numpy()
