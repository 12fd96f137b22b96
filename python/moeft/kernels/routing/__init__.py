"""Sort rows by expert: permutation, inverse and offsets of a stable counting sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeft.kernels.routing import cpu, reference

__all__ = ["Buckets", "bucket"]


class Buckets(NamedTuple):
    """Where each (token, expert) row goes. R rows, E experts."""

    permutation: Tensor  # int64 [R]: row that stands at each sorted position; row = token * k + choice
    inverse: Tensor  # int64 [R]: sorted position of each row
    offsets: Tensor  # int32 [E + 1]: start of each expert's block, then R


def bucket(top_k_index: Tensor, num_experts: int) -> Buckets:
    """Sort the rows of a routing decision by expert, keeping the order of tokens inside an expert.

    Args:
        top_k_index: ``[T, k]`` expert of each choice, int32 or int64.
        num_experts: Number of experts E.

    Returns:
        The buckets, on the device of ``top_k_index``. No host synchronisation on a GPU.

    Raises:
        ValueError: If an index is not an integer in ``[0, num_experts)`` (checked on the CPU only).
    """
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"top_k_index is {top_k_index.dtype}, expected int32 or int64")
    path = cpu if top_k_index.device.type == "cpu" else reference
    return Buckets(*path.bucket(top_k_index.detach().flatten(), num_experts))
