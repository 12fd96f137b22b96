"""Routing on the CPU: the counting sort of the Rust core."""

from __future__ import annotations

import torch
from torch import Tensor

from moeft import _core


def bucket(expert_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.bucket`."""
    rows = expert_index_R.numel()
    permutation = torch.empty(rows, dtype=torch.int64)
    inverse = torch.empty(rows, dtype=torch.int64)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    _core.bucket(
        expert_index_R.contiguous().numpy(), num_experts, permutation.numpy(), inverse.numpy(), offsets.numpy()
    )
    return permutation, inverse, offsets
