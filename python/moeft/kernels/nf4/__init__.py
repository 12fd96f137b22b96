"""Pack weights to 4-bit NormalFloat and back, byte-compatible with bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeft.kernels.nf4 import cpu, reference
from moeft.kernels.nf4.weight import NESTED_BLOCK, Layout, NestedStatistics, NF4Weight

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK",
    "Layout",
    "NF4Weight",
    "NestedStatistics",
    "dequantize",
    "quantize",
    "restore_absmax",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    """Pack a weight to 4 bits.

    Args:
        w: Weight of any shape, float32, bfloat16 or float16. The first axis of a 3-D weight counts experts; each is
            packed on its own, so that no block crosses an expert.
        block_size: Elements that share one absmax, along the flattened weight.
        double_quant: Pack the absmax to 8 bits too, which saves 0.047 bytes per parameter.

    Returns:
        The packed weight, on the device of ``w``.

    Raises:
        ValueError: If a value is not finite, or the dtype or the block size is not one of those above.

    Source:
        QLoRA, https://arxiv.org/abs/2305.14314
    """
    _check("w", w)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}, expected one of {BLOCK_SIZES}")
    layout = Layout.of(w.shape, block_size)
    w = w.detach().contiguous()
    _require_finite(w)
    path = cpu if w.device.type == "cpu" else reference
    packed, absmax = path.quantize(w, layout)
    stacked = w.ndim > 2
    weight = NF4Weight(
        packed.view(layout.packed_shape(stacked)), absmax.view(layout.absmax_shape(stacked)), w.shape, block_size
    )
    return _nest(weight) if double_quant else weight


def dequantize(weight: NF4Weight, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Restore a packed weight.

    Args:
        weight: The packed weight.
        out: Contiguous buffer of as many elements as the weight, to write into. Its dtype counts, not ``dtype``.
        dtype: float32, bfloat16 or float16.

    Returns:
        The weight in its own shape, sharing memory with ``out`` if that was given.

    Raises:
        ValueError: If ``out`` is not contiguous or has another number of elements, another device or dtype.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _check("out", out)
    if out.numel() != weight.shape.numel() or not out.is_contiguous():
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}, expected a contiguous buffer of "
            f"{weight.shape.numel()} elements for a weight of shape {tuple(weight.shape)}"
        )
    if out.device != weight.device:
        raise ValueError(f"out is on {out.device}, the packed weight on {weight.device}")
    weight = restore_absmax(weight)
    if weight.device.type == "cpu":
        cpu.dequantize(weight.packed, weight.absmax, weight.layout, out)
    else:
        out.view(-1).copy_(reference.dequantize(weight.packed, weight.absmax, weight.layout, out.dtype).view(-1))
    return out.view(weight.shape)


def restore_absmax(weight: NF4Weight) -> NF4Weight:
    """The same weight with its statistics in float32; itself if they are already."""
    if weight.nested is None:
        return weight
    if weight.device.type == "cpu":
        absmax = cpu.unnest(weight.absmax, weight.nested.absmax, weight.nested.offset)
    else:
        dynamic_map = cpu.dynamic_map().to(weight.device)
        absmax = reference.restore_absmax(weight.absmax, weight.nested.absmax, weight.nested.offset, dynamic_map)
    return replace(weight, absmax=absmax, nested=None)


def _nest(weight: NF4Weight) -> NF4Weight:
    """Pack the absmax of a weight to 8 bits (on the host: it is 1/64 of the weight)."""
    codes, absmax2, offset = cpu.nest(weight.absmax.cpu())
    nested = NestedStatistics(absmax2.to(weight.device), offset.to(weight.device))
    return replace(weight, absmax=codes.to(weight.device), nested=nested)


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def _require_finite(w: Tensor) -> None:
    if w.device.type == "cpu":
        position = cpu.first_non_finite(w)
    else:
        finite = torch.isfinite(w).view(-1)
        position = None if bool(finite.all()) else int((~finite).nonzero()[0])
    if position is not None:
        raise ValueError(
            f"w has a value that is not finite ({w.view(-1)[position].item()}) at flat position {position}; "
            "a block of 4-bit codes cannot hold it, repair the weight first"
        )
