"""The expert block as one autograd function that keeps little and never forms a weight-sized gradient.

Shapes: T tokens, k experts per token, R = T * k rows sorted by expert, E experts, H hidden, I expert hidden, r rank.

Saved for backward: the tokens, the routing, the input of the activation and the rank-sized products. With ``g`` the
gradient of the output row and ``a`` the activation row, the gradient of a routing weight is ``<W^T g, a>``, so the
output rows are not kept either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.experts.lora import join_b, split_a, split_b
from moeft.kernels.experts.spec import Activation, ExpertLayout, Weights, activate
from moeft.kernels.grouped_linear import grouped_linear, grouped_outer
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.routing import Buckets


class ExpertBlock(torch.autograd.Function):
    """Forward and backward of the expert block; see :func:`moeft.kernels.experts` for the arguments."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x_TH: Tensor,
        weight_Tk: Tensor,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        buckets: Buckets,
        weights: Weights,
        activation: Activation,
        scalings: tuple[float, float],
    ) -> Tensor:
        with weights.in_place() as (gate_up, down, gate_up_bias, down_bias, layout, _):
            tokens, top_k = weight_Tk.shape
            up_lora = _Lora.of(a_up, b_up, scalings[0], gate_up.shape[0], x_TH.dtype)
            down_lora = _Lora.of(a_down, b_down, scalings[1], gate_up.shape[0], x_TH.dtype)

            x_RH = x_TH.index_select(0, buckets.permutation // top_k)
            h_R2I, x_Rr = _linear(x_RH, gate_up, up_lora, buckets.offsets, layout.transposed)
            if gate_up_bias is not None:
                h_R2I += _bias_rows(gate_up_bias, buckets, h_R2I.dtype)
            act_RI = activate(activation, *layout.split(h_R2I))
            y_RH, act_Rr = _linear(act_RI, down, down_lora, buckets.offsets, layout.transposed)
            if down_bias is not None:
                y_RH += _bias_rows(down_bias, buckets, y_RH.dtype)
            y_TkH = y_RH.index_select(0, buckets.inverse).view(tokens, top_k, y_RH.shape[-1])
            out_TH = (y_TkH * weight_Tk[..., None]).sum(1).to(x_TH.dtype)

        ctx.save_for_backward(x_TH, weight_Tk, a_up, b_up, a_down, b_down, *buckets, h_R2I, x_Rr, act_Rr)
        ctx.weights = weights
        ctx.activation = activation
        ctx.scalings = scalings
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x_TH, weight_Tk, a_up, b_up, a_down, b_down, *routing, h_R2I, x_Rr, act_Rr = ctx.saved_tensors
        buckets = Buckets(*routing)
        with ctx.weights.in_place() as (gate_up, down, _, down_bias, layout, _):
            tokens, top_k = weight_Tk.shape
            up_lora = _Lora.of(a_up, b_up, ctx.scalings[0], gate_up.shape[0], x_TH.dtype)
            down_lora = _Lora.of(a_down, b_down, ctx.scalings[1], gate_up.shape[0], x_TH.dtype)
            token_R = buckets.permutation // top_k

            act_RI, act_backward = _activate(h_R2I, ctx.activation, layout)
            # The gradient of row y is weight * g: carry g alone and scale what depends on it.
            weight_R1 = weight_Tk.reshape(-1)[buckets.permutation, None].to(grad_TH.dtype)
            g_RH = grad_TH.index_select(0, token_R)
            grad_act_RI, g_Rr = _linear_backward(g_RH, down, down_lora, buckets.offsets, layout.transposed)
            grad_weight_R = torch.linalg.vecdot(grad_act_RI.to(weight_Tk.dtype), act_RI.to(weight_Tk.dtype))
            if down_bias is not None:
                bias_RH = _bias_rows(down_bias, buckets, weight_Tk.dtype)
                grad_weight_R += torch.linalg.vecdot(g_RH.to(weight_Tk.dtype), bias_RH)
            grad_weight_Tk = grad_weight_R[buckets.inverse].view(tokens, top_k)
            grad_a_down, grad_b_down = _lora_backward(
                g_RH * weight_R1, act_RI, None if g_Rr is None else g_Rr * weight_R1, act_Rr, down_lora, buckets.offsets
            )
            grad_h_R2I = act_backward(grad_act_RI * weight_R1)
            grad_x_RH, grad_h_Rr = _linear_backward(grad_h_R2I, gate_up, up_lora, buckets.offsets, layout.transposed)
            grad_x_TH = grad_x_RH.index_select(0, buckets.inverse).view(tokens, top_k, x_TH.shape[-1]).sum(1)
            x_RH = x_TH.index_select(0, token_R)
            grad_a_up, grad_b_up = _lora_backward(grad_h_R2I, x_RH, grad_h_Rr, x_Rr, up_lora, buckets.offsets)
        lora_gradients = (
            _like(grad_a_up, a_up),
            _like(grad_b_up, b_up),
            _like(grad_a_down, a_down),
            _like(grad_b_down, b_down),
        )
        return grad_x_TH, grad_weight_Tk, *lora_gradients, None, None, None, None


class _Lora:
    """Factors of one stack, one matrix per expert, in the dtype of the rows."""

    def __init__(self, a_ErK: Tensor, b_EFr: Tensor, scaling: float) -> None:
        self.a_ErK = a_ErK
        self.b_EFr = b_EFr
        self.scaling = scaling

    @classmethod
    def of(
        cls, a: Tensor | None, b: Tensor | None, scaling: float, num_experts: int, dtype: torch.dtype
    ) -> _Lora | None:
        if a is None or b is None:
            return None
        return cls(split_a(a.to(dtype), num_experts), split_b(b.to(dtype), num_experts).contiguous(), scaling)


def _linear(
    x_RK: Tensor, weight: NF4Weight | Tensor, lora: _Lora | None, offsets: Tensor, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows through the weight plus ``scaling * B A``; also returns ``A x``, which backward needs."""
    y_RF = grouped_linear(x_RK, weight, offsets, transpose=transposed)
    if lora is None:
        return y_RF, None
    x_Rr = grouped_linear(x_RK, lora.a_ErK, offsets)
    return y_RF.add_(grouped_linear(x_Rr, lora.b_EFr, offsets), alpha=lora.scaling), x_Rr


def _linear_backward(
    g_RF: Tensor, weight: NF4Weight | Tensor, lora: _Lora | None, offsets: Tensor, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the rows; also returns ``B^T g``, which the gradient of A needs."""
    grad_RK = grouped_linear(g_RF, weight, offsets, transpose=not transposed)
    if lora is None:
        return grad_RK, None
    g_Rr = grouped_linear(g_RF, lora.b_EFr, offsets, transpose=True)
    return grad_RK.add_(grouped_linear(g_Rr, lora.a_ErK, offsets, transpose=True), alpha=lora.scaling), g_Rr


def _lora_backward(
    g_RF: Tensor, x_RK: Tensor, g_Rr: Tensor | None, x_Rr: Tensor | None, lora: _Lora | None, offsets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A ``[E * r, K]`` and B ``[F, r * E]``: thin outer products over each expert's rows."""
    if lora is None or g_Rr is None or x_Rr is None:
        return None, None
    grad_a_ErK = grouped_outer(g_Rr, x_RK, offsets).mul_(lora.scaling)
    grad_b_EFr = grouped_outer(g_RF, x_Rr, offsets).mul_(lora.scaling)
    return grad_a_ErK.view(-1, x_RK.shape[-1]), join_b(grad_b_EFr)


def _activate(h_R2I: Tensor, activation: Activation, layout: ExpertLayout) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activation row again, and the function that takes its gradient to the gradient of ``h``."""
    with torch.enable_grad():
        gate_RI, up_RI = (half.detach().requires_grad_() for half in layout.split(h_R2I))
        act_RI = activate(activation, gate_RI, up_RI)

    def backward(grad_RI: Tensor) -> Tensor:
        return layout.join(*torch.autograd.grad(act_RI, (gate_RI, up_RI), grad_RI))

    return act_RI.detach(), backward


def _bias_rows(bias: Tensor, buckets: Buckets, dtype: torch.dtype) -> Tensor:
    """The bias of every row's expert, ``[R, F]``."""
    rows = buckets.permutation.shape[0]
    return bias.to(dtype).repeat_interleave(buckets.offsets.diff(), dim=0, output_size=rows)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
