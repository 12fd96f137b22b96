"""A linear layer on a packed weight, which is restored for each pass and kept by none.

Shapes: K inputs, F outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moeft.kernels import nf4
from moeft.kernels.nf4 import NF4Weight

__all__ = ["packed_linear"]


def packed_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Apply ``x @ W^T + bias`` with a frozen packed weight ``[F, K]``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. Under autocast it is cast to that dtype.
        weight: Packed weight of two axes.
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
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, nf4.dequantize(weight, dtype=x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ nf4.dequantize(ctx.weight, dtype=grad.dtype), None
