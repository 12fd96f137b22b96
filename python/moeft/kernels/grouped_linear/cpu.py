"""The grouped linear on the CPU: tensors handed to the Rust core as buffers, without a copy.

Shapes: R rows, E experts, K inputs, F outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moeft import _core
from moeft.kernels.dtypes import NAMES
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.nf4.cpu import buffer
from moeft.kernels.nf4.weight import Codebook

if TYPE_CHECKING:
    import numpy as np


class Stack(NamedTuple):
    """The weights of all experts as the core reads them."""

    values: np.ndarray
    dtype: str
    codebook: Codebook
    shape: tuple[int, int, int]
    transposed: bool
    bias: np.ndarray | None
    block_size: int
    absmax: np.ndarray | None
    nested_absmax: np.ndarray | None
    nested_offset: float

    @classmethod
    def of(cls, weight: NF4Weight | Tensor, transposed: bool = False, bias: Tensor | None = None) -> Stack:
        """Buffers of a packed or dense stack ``[E, F, K]``; a weight of two axes counts as a stack of one."""
        num_experts, rows, columns = weight.shape if len(weight.shape) == 3 else (1, *weight.shape)
        shape = (num_experts, rows, columns)
        float_bias = None if bias is None else buffer(bias.float().contiguous())
        if isinstance(weight, Tensor):
            values = buffer(weight.contiguous())
            return cls(values, NAMES[weight.dtype], "nf4", shape, transposed, float_bias, 0, None, None, 0.0)
        nested = weight.nested
        return cls(
            buffer(weight.packed.contiguous()),
            "packed",
            weight.codebook,
            shape,
            transposed,
            float_bias,
            weight.block_size,
            buffer(weight.absmax.contiguous()),
            None if nested is None else buffer(nested.absmax),
            0.0 if nested is None else float(nested.offset),
        )


def grouped_linear(x_RK: Tensor, weight: NF4Weight | Tensor, offsets_E1: Tensor, transpose: bool) -> Tensor:
    """As :func:`moeft.kernels.grouped_linear.grouped_linear`; products are summed in float32."""
    x_RK = x_RK.contiguous()
    stack = Stack.of(weight)
    out = x_RK.new_empty(x_RK.shape[0], stack.shape[2 if transpose else 1])
    _core.grouped_linear(
        buffer(x_RK),
        NAMES[x_RK.dtype],
        offsets_E1.numpy(),
        stack,
        transpose,
        buffer(out),
        torch.get_num_threads(),
    )
    return out
