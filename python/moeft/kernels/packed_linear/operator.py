"""The linear layer on a frozen weight as an operator of PyTorch, opaque to ``torch.compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.nf4.operands import flatten, unflatten
from moeft.kernels.packed_linear.product import multiply


def packed_linear(x: Tensor, weight: NF4Weight | Tensor) -> Tensor:
    """As :func:`moeft.kernels.packed_linear.packed_linear`, without a bias, in a graph that is being traced."""
    return product(x, *flatten(weight), False)


@torch.library.custom_op("moeft::packed_linear", mutates_args=())
def product(x: Tensor, weight: Sequence[Tensor], sizes: Sequence[int], codebook: str, transpose: bool) -> Tensor:
    """Rows times a weight of two axes, or its transpose; see :func:`moeft.kernels.packed_linear.product.multiply`."""
    return multiply(x, unflatten(weight, sizes, codebook), transpose)


@product.register_fake
def _(x: Tensor, weight: Sequence[Tensor], sizes: Sequence[int], codebook: str, transpose: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[1 if transpose else 0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, ctx.sizes, ctx.codebook, ctx.transpose = inputs
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    weight = ctx.saved_tensors
    grad_x = product(grad, list(weight), ctx.sizes, ctx.codebook, not ctx.transpose)
    return grad_x, [None] * len(weight), None, None, None


product.register_autograd(_backward, setup_context=_remember)
