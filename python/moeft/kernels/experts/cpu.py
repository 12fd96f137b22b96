"""The expert block on the CPU: tensors handed to the Rust core as buffers, without a copy.

Shapes: T tokens, k experts per token, R = T * k rows sorted by expert, E experts, H hidden, I expert hidden, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moeft import _core
from moeft.kernels.dtypes import NAMES as DTYPES
from moeft.kernels.experts.spec import Activation, ClampedSwiglu, Weights
from moeft.kernels.grouped_linear.cpu import Stack
from moeft.kernels.nf4.cpu import buffer
from moeft.kernels.routing import Buckets

if TYPE_CHECKING:
    import numpy as np


class Factors(NamedTuple):
    """Low-rank factors of a stack as the core reads them, float32."""

    a: np.ndarray
    b: np.ndarray
    scaling: float


class Block(NamedTuple):
    """Everything of a call but the rows, as the core reads it."""

    gate_up: Stack
    down: Stack
    gate_up_lora: Factors | None
    down_lora: Factors | None
    gate: str
    alpha: float
    limit: float
    interleaved: bool
    permutation: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray
    top_k: int
    dtype: str


class Gate(NamedTuple):
    """An activation that the core knows."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0


# Classes of transformers.activations, which come and go between releases.
NAMES = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


def gate_of(activation: Activation) -> Gate | None:
    """The core's version of an activation, or None if it has none."""
    if isinstance(activation, ClampedSwiglu):
        return Gate("clamped_swiglu", activation.alpha, activation.limit)
    if activation is functional.silu or isinstance(activation, torch.nn.SiLU):
        return Gate("silu")
    if isinstance(activation, torch.nn.GELU):
        return Gate("gelu_tanh") if activation.approximate == "tanh" else None
    kind = type(activation)
    name = NAMES.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
    return None if name is None else Gate(name)


class ExpertBlock(torch.autograd.Function):
    """Forward and backward of the expert block in the Rust core.

    Saved for backward: the tokens, the routing and the input of the activation. The low-rank products are computed
    again: they cost a thousandth of the block.
    """

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
        gate: Gate,
        scalings: tuple[float, float],
    ) -> Tensor:
        x_TH = x_TH.contiguous()
        ctx.weights, ctx.gate, ctx.scalings = weights, gate, scalings
        out_TH = torch.empty_like(x_TH)
        needs_grad = any(ctx.needs_input_grad[:6])
        rows, inner = weight_Tk.numel(), weights.layout.sizes(weights.down.shape)[1]
        h_R2I = x_TH.new_empty(rows if needs_grad else 0, 2 * inner)
        with weights.in_place() as here:
            block = _block(ctx, here, x_TH, weight_Tk, (a_up, b_up), (a_down, b_down), buckets)
            _core.experts_forward(
                block, buffer(x_TH), buffer(h_R2I) if needs_grad else None, buffer(out_TH), torch.get_num_threads()
            )
        if needs_grad:
            ctx.save_for_backward(x_TH, weight_Tk, a_up, b_up, a_down, b_down, *buckets, h_R2I)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x_TH, weight_Tk, a_up, b_up, a_down, b_down, *routing, h_R2I = ctx.saved_tensors
        grad_x_TH = torch.empty_like(x_TH) if ctx.needs_input_grad[0] else None
        grad_weight_Tk = torch.empty(weight_Tk.shape, dtype=torch.float32)
        grad_up = _gradients(a_up, b_up, any(ctx.needs_input_grad[2:4]))
        grad_down = _gradients(a_down, b_down, any(ctx.needs_input_grad[4:6]))
        with ctx.weights.in_place() as here:
            _core.experts_backward(
                _block(ctx, here, x_TH, weight_Tk, (a_up, b_up), (a_down, b_down), Buckets(*routing)),
                buffer(x_TH),
                buffer(h_R2I),
                buffer(grad_TH.contiguous()),
                None if grad_x_TH is None else buffer(grad_x_TH),
                buffer(grad_weight_Tk),
                grad_up and (buffer(grad_up[0]), buffer(grad_up[1])),
                grad_down and (buffer(grad_down[0]), buffer(grad_down[1])),
                torch.get_num_threads(),
            )
        factors = zip(
            (*(grad_up or (None, None)), *(grad_down or (None, None))), (a_up, b_up, a_down, b_down), strict=True
        )
        lora_gradients = (None if grad is None or like is None else grad.to(like.dtype) for grad, like in factors)
        return grad_x_TH, grad_weight_Tk.to(weight_Tk.dtype), *lora_gradients, None, None, None, None


def _block(
    ctx: Any,
    weights: Weights,
    x_TH: Tensor,
    weight_Tk: Tensor,
    up_factors: tuple[Tensor | None, Tensor | None],
    down_factors: tuple[Tensor | None, Tensor | None],
    buckets: Buckets,
) -> Block:
    gate_up, down, gate_up_bias, down_bias, layout, _ = weights
    return Block(
        gate_up=Stack.of(gate_up, layout.transposed, gate_up_bias),
        down=Stack.of(down, layout.transposed, down_bias),
        gate_up_lora=_factors(*up_factors, ctx.scalings[0]),
        down_lora=_factors(*down_factors, ctx.scalings[1]),
        gate=ctx.gate.name,
        alpha=ctx.gate.alpha,
        limit=ctx.gate.limit,
        interleaved=layout.interleaved,
        permutation=buckets.permutation.numpy(),
        offsets=buckets.offsets.numpy(),
        weights=buffer(weight_Tk.detach().float().contiguous()),
        top_k=weight_Tk.shape[1],
        dtype=DTYPES[x_TH.dtype],
    )


def _factors(a: Tensor | None, b: Tensor | None, scaling: float) -> Factors | None:
    if a is None or b is None:
        return None
    return Factors(buffer(a.float().contiguous()), buffer(b.float().contiguous()), scaling)


def _gradients(a: Tensor | None, b: Tensor | None, needed: bool) -> tuple[Tensor, Tensor] | None:
    """Room for the gradients of two factors, float32."""
    if a is None or b is None or not needed:
        return None
    return torch.empty(a.shape, dtype=torch.float32), torch.empty(b.shape, dtype=torch.float32)


def _like(
    gradients: tuple[Tensor, Tensor] | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in the dtypes of their factors."""
    if gradients is None or a is None or b is None:
        return None, None
    return gradients[0].to(a.dtype), gradients[1].to(b.dtype)
