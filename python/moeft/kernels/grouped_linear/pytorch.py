"""The grouped linear through PyTorch's own kernels, on any device.

Shapes: R rows, E experts, K inputs, F outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeft.kernels import nf4
from moeft.kernels.grouped_linear import reference
from moeft.kernels.nf4 import NF4Weight

# Upper bound of the buffer that holds dequantised experts. Small enough to be reused from the allocator's cache,
# large enough that a chunk holds dozens of experts of 26B-A4B (2 MiB to 8 MiB each).
WORKSPACE_BYTES = 64 << 20
CPU_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_GROUPED_MM_DTYPES = (torch.bfloat16,)
GROUPED_MM_ALIGNMENT = 16  # bytes; torch.nn.functional.grouped_mm refuses other strides


def grouped_linear(
    x_RK: Tensor,
    weight: NF4Weight | Tensor,
    offsets_E1: Tensor,
    transpose: bool,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """As :func:`moeft.kernels.grouped_linear.grouped_linear`.

    Packed weights are restored a few experts at a time, in the dtype of ``x_RK``, into a buffer of at most
    ``workspace_bytes`` or one expert.
    """
    if isinstance(weight, Tensor):
        return _matmul(x_RK, weight.to(x_RK.dtype), offsets_E1, transpose)
    num_experts, out_features, in_features = weight.shape
    weight = nf4.restore_absmax(weight)
    chunk = max(1, workspace_bytes // (out_features * in_features * x_RK.element_size()))
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
    """As :func:`moeft.kernels.grouped_linear.grouped_outer`."""
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
