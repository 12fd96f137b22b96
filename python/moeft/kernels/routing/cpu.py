"""Routing on the CPU, by the Rust core: a counting sort, and statistics of what it counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeft import _core


def bucket(top_k_index_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.bucket`."""
    rows = top_k_index_Tk.numel()
    # Made by numpy: a decision of few tokens takes microseconds, and torch.empty and Tensor.numpy take two each.
    permutation = np.empty(rows, np.int64)
    inverse = np.empty(rows, np.int64)
    offsets = np.empty(num_experts + 1, np.int32)
    _core.bucket(top_k_index_Tk.contiguous().numpy(), num_experts, permutation, inverse, offsets)
    return torch.from_numpy(permutation), torch.from_numpy(inverse), torch.from_numpy(offsets)


def load_statistics(offsets_E1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.load_statistics`."""
    statistics = torch.tensor(_core.load_statistics(offsets_E1.contiguous().numpy()), dtype=torch.float64)
    return statistics[0], statistics[1], statistics[2]
