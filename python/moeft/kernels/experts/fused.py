"""The expert block on a GPU as an autograd function over the operators.

Shapes: T tokens, k experts per token, H hidden, R = T * k rows.

Saved for backward: the tokens, the routing, the input of the activation and rank-sized products. Weights are kept as
the object that holds them, and asked for again in backward, so that one whose bytes come and go works too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.experts import gpu, operator
from moeft.kernels.experts.spec import PLAIN, Weights
from moeft.kernels.nf4.operands import flatten


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
        permutation: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        weights: Weights,
        gate: str,
        scalings: tuple[float, float],
        with_gradient: bool,
    ) -> Tensor:
        # Leaves that train are said to need a gradient where gradients are off, too.
        keep = with_gradient and any(ctx.needs_input_grad[:6])
        factors = (a_up, b_up, a_down, b_down)
        routing = (permutation, inverse, offsets)
        with weights.in_place() as here:
            out_TH, *saved = operator.experts_forward(
                x_TH, weight_Tk, *routing, *stacks(here), *factors, *scalings, gate, keep
            )
        if keep:
            ctx.save_for_backward(x_TH, weight_Tk, *routing, *factors, *saved)
        ctx.weights, ctx.gate, ctx.scalings = weights, gate, scalings
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x_TH, weight_Tk, permutation, inverse, offsets, *factors_and_saved = ctx.saved_tensors
        factors, saved = factors_and_saved[:4], factors_and_saved[4:]
        with ctx.weights.in_place() as here:
            gradients = operator.experts_backward(
                grad_TH,
                x_TH,
                weight_Tk,
                permutation,
                inverse,
                offsets,
                *stacks(here),
                *factors,
                *ctx.scalings,
                ctx.gate,
                *saved,
            )
        needed = zip(ctx.needs_input_grad, gradients, strict=False)
        return *(gradient if wanted else None for wanted, gradient in needed), *([None] * 7)


def stacks(weights: Weights) -> tuple[list[Tensor], list[int], list[Tensor], list[int], str]:
    """Both stacks as the operators take them."""
    gate_up, gate_up_sizes, codebook = flatten(weights.gate_up)
    down, down_sizes, _ = flatten(weights.down)  # of the same codebook, or not known here
    return gate_up, gate_up_sizes, down, down_sizes, codebook


def knows(weights: Weights, gate: str) -> bool:
    """Whether the kernels know a gate, and how the weights are stored."""
    biased = weights.gate_up_bias is not None or weights.down_bias is not None
    one_codebook = flatten(weights.gate_up)[2] == flatten(weights.down)[2]
    return gate in gpu.GATES and weights.layout == PLAIN and not biased and one_codebook
