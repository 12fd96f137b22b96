"""A low-rank update of the output of a linear layer.

Shapes: N rows, K inputs, F outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["add_low_rank"]


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y + scaling * (x @ a^T) @ b^T`` as one operation: nothing of the size of ``y`` is scaled or added by itself.

    Products run in the dtype of the factors, and the sum is rounded to that of ``y`` once, as PEFT does. Kept for
    backward: ``x`` as it is, the factors, and ``scaling * x @ a^T``.

    Args:
        y: ``[..., F]``, output of the layer.
        x: ``[..., K]``, input of the layer; in another dtype than the factors it is cast for each product.
        a: ``[r, K]``.
        b: ``[F, r]`` in the dtype of ``a``.
        scaling: Factor of the update.

    Returns:
        ``[..., F]`` in the dtype of ``y``.

    Source:
        LoRA, https://arxiv.org/abs/2106.09685
    """
    return _AddLowRank.apply(y, x, a, b, scaling)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_rK: Tensor, b_Fr: Tensor, scaling: float) -> Tensor:
        x_NK, y_NF = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        low_Nr = (x_NK.to(a_rK.dtype) @ a_rK.mT).mul_(scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, a_rK, b_Fr, low_Nr)
        return torch.addmm(y_NF.to(b_Fr.dtype), low_Nr, b_Fr.mT).to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_rK, b_Fr, low_Nr = ctx.saved_tensors
        grad_NF = grad.reshape(-1, grad.shape[-1]).to(b_Fr.dtype)
        grad_low_Nr = (grad_NF @ b_Fr).mul_(ctx.scaling)
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = (grad_low_Nr @ a_rK).to(x.dtype).view(x.shape) if needs_x else None
        grad_a = grad_low_Nr.mT @ x.reshape(-1, x.shape[-1]).to(a_rK.dtype) if needs_a else None
        grad_b = grad_NF.mT @ low_Nr if needs_b else None
        return grad, grad_x, grad_a, grad_b, None
