"""The definition of routing in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def bucket(expert_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort by expert: ``permutation`` int64 [R], ``inverse`` int64 [R], ``offsets`` int32 [E + 1]."""
    permutation = torch.argsort(expert_index_R, stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    experts = torch.arange(num_experts + 1, device=expert_index_R.device)
    offsets = torch.searchsorted(expert_index_R[permutation].long(), experts)
    return permutation, inverse, offsets.to(torch.int32)
