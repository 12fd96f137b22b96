"""AdamW on the CPU: the fused step of the Rust core, on tensors handed over as buffers without a copy."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeft import _core
from moeft.kernels.adamw.moments import BLOCK_SIZE, Moments

if TYPE_CHECKING:
    import numpy as np


def step(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    rounded: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """As :func:`moeft.kernels.adamw.reference.step`, bit for bit."""
    _core.adamw_step(
        _buffer(param),
        _buffer(grad),
        _buffer(moments.exp_avg),
        _buffer(moments.exp_avg_sq),
        None if moments.exp_avg_absmax is None else _buffer(moments.exp_avg_absmax),
        None if moments.exp_avg_sq_absmax is None else _buffer(moments.exp_avg_sq_absmax),
        None if rounded is None else _buffer(rounded),
        lr,
        *betas,
        eps,
        weight_decay,
        step,
        torch.get_num_threads(),
    )


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """8-bit form of float32 values: uint8 codes in their shape, float32 scales ``[ceil(n / 256)]``."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-values.numel() // BLOCK_SIZE))
    _core.blockwise_quantize(_buffer(values.contiguous()), signed, _buffer(codes), _buffer(absmax))
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Float32 values of their 8-bit form."""
    out = torch.empty(codes.shape)
    _core.blockwise_dequantize(_buffer(codes.contiguous()), _buffer(absmax), signed, _buffer(out))
    return out


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """Values of the 256 codes of bitsandbytes' dynamic type, float32, ascending."""
    return dequantize(torch.arange(256, dtype=torch.uint8), torch.ones(1), signed)


def _buffer(tensor: Tensor) -> np.ndarray:
    """A flat view that numpy can name: bfloat16 as uint16."""
    flat = tensor.detach().view(-1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
