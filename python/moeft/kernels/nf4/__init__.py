"""Pack weights to 4-bit NormalFloat (or FP4) and back, byte-compatible with bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from moeft.kernels.dispatch import in_triton
from moeft.kernels.nf4 import cpu, gpu, reference
from moeft.kernels.nf4.weight import NESTED_BLOCK, Codebook, Layout, NestedStatistics, NF4Weight

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK",
    "Codebook",
    "Layout",
    "NF4Weight",
    "NestedStatistics",
    "dequantize",
    "quantize",
    "restore_absmax",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PART_ELEMENTS = 1 << 23
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = False, codebook: Codebook = "nf4") -> NF4Weight:
    """Pack a weight to 4 bits.

    Args:
        w: Weight of any shape, float32, bfloat16 or float16; copied first if it is not contiguous. The first axis of a
            3-D weight counts experts; each is packed on its own, so that no block crosses an expert.
        block_size: Elements that share one absmax, along the flattened weight.
        double_quant: Pack the absmax to 8 bits too, which saves 0.047 bytes per parameter.
        codebook: The sixteen values, ``"nf4"`` or ``"fp4"``.

    Returns:
        The packed weight, on the device of ``w``.

    Raises:
        ValueError: If ``w`` is empty, a value is not finite, or the dtype, the block size or the codebook is not one
            of those above.

    Source:
        QLoRA, https://arxiv.org/abs/2305.14314
    """
    _check("w", w)
    if w.numel() == 0:
        raise ValueError(f"w is empty, shape {tuple(w.shape)}, expected at least one value")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}, expected one of {BLOCK_SIZES}")
    if codebook not in get_args(Codebook):
        raise ValueError(f"codebook is {codebook!r}, expected one of {get_args(Codebook)}")
    layout = Layout.of(w.shape, block_size)
    w = w.detach().contiguous()
    path = cpu.quantize if w.device.type == "cpu" else _quantize_in_parts
    packed, absmax = path(w, layout, codebook)
    _require_finite(w, absmax)
    stacked = w.ndim > 2
    weight = NF4Weight(
        packed.view(layout.packed_shape(stacked)),
        absmax.view(layout.absmax_shape(stacked)),
        w.shape,
        block_size,
        codebook=codebook,
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
        ValueError: If ``out`` is not contiguous, overlaps the weight or has another number of elements, another device
            or dtype; if codes or statistics of the weight have a wrong dtype or length.
    """
    _check_packed(weight)
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
    if weight.device.type == "cpu":
        cpu.dequantize(weight, out)
    elif in_triton(out):
        gpu.dequantize(_contiguous(weight), out)
    else:
        weight = restore_absmax(weight)
        values = reference.dequantize(weight.packed, weight.absmax, weight.layout, out.dtype, weight.codebook)
        out.view(-1).copy_(values.view(-1))
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


def _quantize_in_parts(w: Tensor, layout: Layout, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """The definition, some groups at a time: it takes thirty times the memory of 16-bit values."""
    packed = torch.empty(layout.groups, layout.packed_bytes, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(layout.groups, layout.blocks, dtype=torch.float32, device=w.device)
    values = w.view(layout.groups, layout.group_len)
    step = max(1, PART_ELEMENTS // layout.group_len)
    for start in range(0, layout.groups, step):
        part = values[start : start + step]
        small = Layout(part.shape[0], layout.group_len, layout.block_size)
        packed[start : start + step], absmax[start : start + step] = reference.quantize(part, small, codebook)
    return packed, absmax


def _nest(weight: NF4Weight) -> NF4Weight:
    """Pack the absmax of a weight to 8 bits (on the host: it is 1/64 of the weight)."""
    codes, absmax2, offset = cpu.nest(weight.absmax.cpu())
    nested = NestedStatistics(absmax2.to(weight.device), offset.to(weight.device))
    return replace(weight, absmax=codes.to(weight.device), nested=nested)


def _contiguous(weight: NF4Weight) -> NF4Weight:
    return replace(weight, packed=weight.packed.contiguous(), absmax=weight.absmax.contiguous())


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def _check_packed(weight: NF4Weight) -> None:
    layout, nested = weight.layout, weight.nested
    expected = {
        "packed": (weight.packed, torch.uint8, layout.groups * layout.packed_bytes),
        "absmax": (weight.absmax, torch.float32 if nested is None else torch.uint8, layout.groups * layout.blocks),
    }
    if nested is not None:
        blocks = -(-layout.groups * layout.blocks // NESTED_BLOCK)
        expected["nested.absmax"] = (nested.absmax, torch.float32, blocks)
        expected["nested.offset"] = (nested.offset, torch.float32, 1)
    for name, (tensor, dtype, length) in expected.items():
        if tensor.dtype != dtype or tensor.numel() != length:
            raise ValueError(
                f"{name} is {tensor.dtype} of {tensor.numel()} elements, expected {dtype} of {length} for a weight of "
                f"shape {tuple(weight.shape)} in blocks of {weight.block_size}"
            )


def _require_finite(w: Tensor, absmax: Tensor) -> None:
    """A value that is not finite shows in the absmax of its block, so that the values need no pass of their own."""
    if w.device.type == "cpu":
        position = None if cpu.first_non_finite(absmax) is None else cpu.first_non_finite(w)
    else:
        finite = torch.isfinite(absmax).all()
        position = None if bool(finite) else int((~torch.isfinite(w)).view(-1).nonzero()[0])
    if position is not None:
        raise ValueError(
            f"w has a value that is not finite ({w.view(-1)[position].item()}) at flat position {position}; "
            "a block of 4-bit codes cannot hold it, repair the weight first"
        )
