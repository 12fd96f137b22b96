"""Root-mean-square normalisation on a GPU, by PyTorch's fused kernel.

``torch.nn.functional.rms_norm`` is there one launch forward and one for the gradient of the rows, keeps the rows as
they are and one float32 of each, sums in float32 and rounds once, after the weight. What a formula has beyond that is
composed around it, with the same roundings.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, rounds_before_weight: bool) -> Tensor:
    """As :func:`moeft.kernels.rms_norm.rms_norm`."""
    device = x.device.type
    # Autocast of PyTorch 2.15, not of 2.11, makes this an operation of float32, output included; models have none such.
    without_autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with without_autocast:
        if weight is None or not (offset or rounds_before_weight):
            return functional.rms_norm(x, x.shape[-1:], weight, eps)
        if rounds_before_weight:
            return functional.rms_norm(x, x.shape[-1:], None, eps) * (weight + offset if offset else weight)
        if x.dtype == torch.float32:
            return functional.rms_norm(x, x.shape[-1:], weight + offset, eps)
        return _WideWeight.apply(x, weight, eps, offset)


class _WideWeight(torch.autograd.Function):
    """Rows of 16 bits times ``weight + offset`` in float32. The rows are kept as they are, and widened anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight_H)
        ctx.eps, ctx.offset = eps, offset
        return functional.rms_norm(x.float(), x.shape[-1:], weight_H.float() + offset, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_H = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        with torch.enable_grad():
            wide = x.detach().float().requires_grad_(needs_x)
            wide_weight_H = weight_H.detach().float().requires_grad_(needs_weight)
            out = functional.rms_norm(wide, x.shape[-1:], wide_weight_H + ctx.offset, ctx.eps)
        leaves = [leaf for leaf in (wide, wide_weight_H) if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(out, leaves, grad.float()))
        grad_x = next(gradients).to(x.dtype) if needs_x else None
        return grad_x, next(gradients).to(weight_H.dtype) if needs_weight else None, None, None
