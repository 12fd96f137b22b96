"""Products of rows with a frozen weight of two axes, and with its transpose.

Shapes: K inputs, F outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeft import _core
from moeft.kernels import nf4
from moeft.kernels.dispatch import in_core
from moeft.kernels.grouped_linear import cpu
from moeft.kernels.nf4 import NF4Weight

FEW_ROWS = 8  # reading the weight is then all the work, and the core reads it packed


def multiply(x: Tensor, weight: NF4Weight | Tensor, transpose: bool) -> Tensor:
    """``x @ W^T``, ``[..., K]`` to ``[..., F]``; with ``transpose`` ``x @ W``, the other way."""
    if _in_core(x):
        rows = x.reshape(-1, x.shape[-1])
        one_group = torch.tensor([0, rows.shape[0]], dtype=torch.int32)
        y = cpu.grouped_linear(rows, weight, one_group, transpose)
        return y.view(*x.shape[:-1], y.shape[-1])
    dense = weight.to(x.dtype) if isinstance(weight, Tensor) else nf4.dequantize(weight, dtype=x.dtype)
    return x @ dense if transpose else functional.linear(x, dense)


def _in_core(x: Tensor) -> bool:
    """Whether the Rust core multiplies: on the CPU, unless it has instructions for bf16 that only PyTorch uses."""
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    return in_core(x) and (few or x.dtype == torch.float32 or not _core.has_bf16_instructions())
