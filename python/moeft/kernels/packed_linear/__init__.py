"""A linear layer on a frozen weight; a packed one is restored for each pass and kept by none.

Shapes: K inputs, F outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.packed_linear import operator
from moeft.kernels.packed_linear.product import multiply

__all__ = ["packed_linear"]


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
    # The core's calls and Triton's launches cannot be traced.
    y = operator.packed_linear(x, weight) if torch.compiler.is_compiling() else _PackedLinear.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight | Tensor) -> Tensor:
        ctx.weight = weight
        return multiply(x, weight, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return multiply(grad, ctx.weight, transpose=True), None
