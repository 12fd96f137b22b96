"""Linear layers of many experts at once, over rows sorted by expert.

Shapes: R rows, E experts, K inputs, F outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeft.kernels import nf4
from moeft.kernels.grouped_linear import cpu, reference
from moeft.kernels.nf4 import NF4Weight

__all__ = ["grouped_linear", "grouped_outer"]

# Upper bound of the buffer that holds dequantised experts. Small enough to be reused from the allocator's cache,
# large enough that a chunk holds dozens of experts of 26B-A4B (2 MiB to 8 MiB each).
WORKSPACE_BYTES = 64 << 20
CPU_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_GROUPED_MM_DTYPES = (torch.bfloat16,)
GROUPED_MM_ALIGNMENT = 16  # bytes; torch.nn.functional.grouped_mm refuses other strides


def grouped_linear(x_RK: Tensor, weight: NF4Weight | Tensor, offsets_E1: Tensor, *, transpose: bool = False) -> Tensor:
    """Multiply each expert's block of rows by that expert's weight.

    On the CPU a weight is restored panel by panel (128 KiB) in the Rust core; float64, which only tests use, goes
    through PyTorch. On a GPU packed weights are restored a few experts at a time into a buffer of at most 64 MiB, in
    the dtype of ``x_RK``.

    Args:
        x_RK: Rows sorted by expert. ``[R, F]`` with ``transpose``.
        weight: Packed or dense weights of E experts, each ``[F, K]`` as in ``nn.Linear``.
        offsets_E1: Start of each expert's block, then R; int32, on the device of ``x_RK``.
        transpose: Multiply by the weight itself instead of its transpose: the gradient with respect to the rows.

    Returns:
        ``[R, F]``, or ``[R, K]`` with ``transpose``, in the dtype of ``x_RK``.

    Source:
        MegaBlocks, https://arxiv.org/abs/2211.15841
    """
    if x_RK.device.type == "cpu" and x_RK.dtype in cpu.DTYPES:
        return cpu.grouped_linear(x_RK, weight, offsets_E1, transpose)
    if isinstance(weight, Tensor):
        return _matmul(x_RK, weight.to(x_RK.dtype), offsets_E1, transpose)
    num_experts, out_features, in_features = weight.shape
    weight = nf4.restore_absmax(weight)
    chunk = max(1, WORKSPACE_BYTES // (out_features * in_features * x_RK.element_size()))
    if chunk >= num_experts:
        return _matmul(x_RK, nf4.dequantize(weight, dtype=x_RK.dtype), offsets_E1, transpose)
    out = x_RK.new_empty(x_RK.shape[0], in_features if transpose else out_features)
    workspace = x_RK.new_empty(chunk, out_features, in_features)
    bounds = offsets_E1.tolist()
    for start in range(0, num_experts, chunk):
        stop = min(start + chunk, num_experts)
        rows = slice(bounds[start], bounds[stop])
        if rows.start == rows.stop:
            continue
        dense = nf4.dequantize(weight.experts(start, stop), out=workspace[: stop - start], dtype=x_RK.dtype)
        out[rows] = _matmul(x_RK[rows], dense, offsets_E1[start : stop + 1] - bounds[start], transpose)
    return out


def grouped_outer(g_RF: Tensor, x_RK: Tensor, offsets_E1: Tensor) -> Tensor:
    """Sum the outer products of each expert's rows.

    Args:
        g_RF: Gradient rows sorted by expert.
        x_RK: Input rows sorted by expert, dtype of ``g_RF``.
        offsets_E1: Start of each expert's block, then R; int32.

    Returns:
        ``[E, F, K]``; zero for an expert without rows.
    """
    if _aligned(g_RF, x_RK):
        return functional.grouped_mm(g_RF.mT, x_RK, offs=offsets_E1[1:])
    return reference.grouped_outer(g_RF, x_RK, offsets_E1)


def _matmul(x_RK: Tensor, w_EFK: Tensor, offsets_E1: Tensor, transpose: bool) -> Tensor:
    right = w_EFK.mT if not transpose else w_EFK
    if x_RK.shape[0] and _aligned(x_RK, w_EFK):
        return functional.grouped_mm(x_RK, right, offs=offsets_E1[1:])
    return reference.grouped_linear(x_RK, right.mT, offsets_E1)


def _aligned(*operands: Tensor) -> bool:
    """Whether torch.nn.functional.grouped_mm takes these operands."""
    dtypes = CPU_GROUPED_MM_DTYPES if operands[0].device.type == "cpu" else CUDA_GROUPED_MM_DTYPES
    return all(
        t.dtype in dtypes and t.is_contiguous() and t.shape[-1] * t.element_size() % GROUPED_MM_ALIGNMENT == 0
        for t in operands
    )
