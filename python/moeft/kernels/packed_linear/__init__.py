"""A linear layer on a frozen weight; a packed one is restored for each pass and kept by none.

Shapes: K inputs, F outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moeft import _core
from moeft.kernels import nf4
from moeft.kernels.dispatch import in_core
from moeft.kernels.grouped_linear import cpu
from moeft.kernels.nf4 import NF4Weight

__all__ = ["packed_linear"]

FEW_ROWS = 8  # reading the weight is then all the work, and the core reads it packed


def packed_linear(x: Tensor, weight: NF4Weight | Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply ``x @ W^T + bias`` with a frozen weight ``[F, K]``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. Under autocast it is cast to that dtype.
        weight: Weight of two axes, packed or dense.
        bias: ``[F]`` or None.

    Returns:
        ``[..., F]`` in the dtype of ``x``.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _PackedLinear.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight | Tensor) -> Tensor:
        ctx.weight = weight
        return _multiply(x, weight, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _multiply(grad, ctx.weight, transpose=True), None


def _multiply(x: Tensor, weight: NF4Weight | Tensor, transpose: bool) -> Tensor:
    if _in_core(x):
        rows = x.reshape(-1, x.shape[-1])
        one_group = torch.tensor([0, rows.shape[0]], dtype=torch.int32)
        y = cpu.grouped_linear(rows, weight, one_group, transpose)
        return y.view(*x.shape[:-1], y.shape[-1])
    dense = weight.to(x.dtype) if isinstance(weight, Tensor) else nf4.dequantize(weight, dtype=x.dtype)
    return x @ dense if transpose else functional.linear(x, dense)


def _in_core(x: Tensor) -> bool:
    """Whether the Rust core multiplies: on the CPU, unless it has instructions for bf16 that only PyTorch uses."""
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    return in_core(x) and (few or x.dtype == torch.float32 or not _core.has_bf16_instructions())
