"""Routing on the CPU, by the Rust core: a counting sort, and statistics of what it counted."""

from __future__ import annotations

import torch
from torch import Tensor

from moeft import _core


def bucket(top_k_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.bucket`."""
    rows = top_k_index_R.numel()
    permutation = torch.empty(rows, dtype=torch.int64)
    inverse = torch.empty(rows, dtype=torch.int64)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    _core.bucket(top_k_index_R.contiguous().numpy(), num_experts, permutation.numpy(), inverse.numpy(), offsets.numpy())
    return permutation, inverse, offsets


def load_statistics(offsets_E1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.load_statistics`."""
    statistics = torch.tensor(_core.load_statistics(offsets_E1.contiguous().numpy()), dtype=torch.float64)
    return statistics[0], statistics[1], statistics[2]
