"""The definition of routing in plain PyTorch, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bucket(top_k_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort by expert: ``permutation`` int64 [R], ``inverse`` int64 [R], ``offsets`` int32 [E + 1]."""
    permutation = torch.argsort(top_k_index_R, stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    experts = torch.arange(num_experts + 1, device=top_k_index_R.device)
    offsets = torch.searchsorted(top_k_index_R[permutation].long(), experts)
    return permutation, inverse, offsets.to(torch.int32)


def load_statistics(offsets_E1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy in nats, the same over ``ln E``, and coefficient of variation of the counts; float64 scalars."""
    counts_E = offsets_E1.diff().double()
    rows = counts_E.sum().clamp(min=1)
    share_E = counts_E / rows
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    num_experts = counts_E.numel()
    normalized = (entropy / math.log(num_experts) if num_experts > 1 else counts_E.sum()).clamp(max=1)
    deviation = (counts_E - counts_E.mean()).square().mean().sqrt()
    return entropy, normalized, deviation / (rows / num_experts)
