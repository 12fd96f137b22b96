"""Root-mean-square normalisation on the CPU, by the Rust core.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft import _core


class RmsNorm(torch.autograd.Function):
    """Forward and backward in one pass each. Saved for backward: the rows, and one number of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor | None, eps: float) -> Tensor:  # noqa: D102
        x = x.contiguous()
        out, rstd_N = torch.empty_like(x), x.new_empty(x.shape[:-1])
        threads = torch.get_num_threads()
        _core.rms_norm_forward(_array(x), _array(weight_H), eps, out.numpy(), rstd_N.numpy(), x.shape[-1], threads)
        ctx.save_for_backward(x, weight_H, rstd_N)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        x, weight_H, rstd_N = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        _core.rms_norm_backward(
            _array(x),
            _array(weight_H),
            rstd_N.numpy(),
            _array(grad),
            grad_x.numpy(),
            x.shape[-1],
            torch.get_num_threads(),
        )
        return grad_x, None, None


def _array(tensor: Tensor | None) -> Any:
    # A norm is short: only what needs it is detached, and nothing is flattened.
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()
