"""Root-mean-square normalisation on the CPU, by the Rust core.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft import _core
from moeft.kernels.nf4.cpu import buffer


class RmsNorm(torch.autograd.Function):
    """Forward and backward in one pass each. Saved for backward: the rows, and one number of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor | None, eps: float) -> Tensor:  # noqa: D102
        x = x.contiguous()
        out, rstd_N = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _core.rms_norm_forward(
            buffer(x), _weight(weight_H), eps, buffer(out), buffer(rstd_N), x.shape[-1], torch.get_num_threads()
        )
        ctx.save_for_backward(x, weight_H, rstd_N)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        x, weight_H, rstd_N = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        _core.rms_norm_backward(
            buffer(x),
            _weight(weight_H),
            buffer(rstd_N),
            buffer(grad),
            buffer(grad_x),
            x.shape[-1],
            torch.get_num_threads(),
        )
        return grad_x, None, None


def _weight(weight_H: Tensor | None) -> Any:
    return None if weight_H is None else buffer(weight_H.contiguous())
