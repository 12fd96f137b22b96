"""Sort rows by expert (permutation, inverse and offsets of a stable counting sort), and say how even the load is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeft.kernels.dispatch import has_triton
from moeft.kernels.routing import cpu, gpu, reference

__all__ = ["Buckets", "LoadStatistics", "bucket", "load_statistics"]

# A decision of few tokens takes microseconds: what is looked up once and not per call shows.
_INDEX_DTYPES = (torch.int32, torch.int64)


class Buckets(NamedTuple):
    """Where each (token, expert) row goes. R rows, E experts."""

    permutation: Tensor  # int64 [R]: row that stands at each sorted position; row = token * k + choice
    inverse: Tensor  # int64 [R]: sorted position of each row
    offsets: Tensor  # int32 [E + 1]: start of each expert's block, then R

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int32 [E]."""
        return self.offsets.diff()


class LoadStatistics(NamedTuple):
    """How evenly rows are spread over E experts: float64 scalars on the device of the buckets, all 0 without rows."""

    entropy: Tensor  # of the experts' shares, in nats: ln E if all are equal, 0 if one expert has every row
    normalized_entropy: Tensor  # entropy / ln E, in [0, 1]; 1 for a single expert
    coefficient_of_variation: Tensor  # standard deviation of the counts (divided by E) over their mean


def bucket(top_k_index: Tensor, num_experts: int) -> Buckets:
    """Sort the rows of a routing decision by expert, keeping the order of tokens inside an expert.

    Args:
        top_k_index: ``[T, k]`` expert of each choice, int32 or int64; a copy is made if it is not contiguous.
        num_experts: Number of experts E, at least k.

    Returns:
        The buckets, on the device of ``top_k_index``. No host synchronisation on a GPU.

    Raises:
        ValueError: If the shape or the dtype is another, or an index is not in ``[0, num_experts)`` (that is checked
            on the CPU only).
    """
    if top_k_index.dtype not in _INDEX_DTYPES:
        raise ValueError(f"top_k_index is {top_k_index.dtype}, expected int32 or int64")
    shape = top_k_index.shape
    if len(shape) != 2:
        raise ValueError(f"top_k_index has the shape {list(shape)}, expected [tokens, k]")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, expected at least 1")
    if shape[1] > num_experts:
        raise ValueError(f"top_k_index has {shape[1]} choices per token, expected at most num_experts = {num_experts}")
    if top_k_index.is_cpu:
        return Buckets(*cpu.bucket(top_k_index, num_experts))
    if has_triton(top_k_index.device):
        return Buckets(*gpu.bucket(top_k_index.flatten(), num_experts))
    return Buckets(*reference.bucket(top_k_index.flatten(), num_experts))


def load_statistics(buckets: Buckets) -> LoadStatistics:
    """Say how evenly the rows are spread over the experts. Reads E + 1 offsets, no row.

    Args:
        buckets: What :func:`bucket` returned.

    Returns:
        The statistics; no host synchronisation on a GPU. Rows per expert are ``buckets.counts``.
    """
    path = cpu if buckets.offsets.device.type == "cpu" else reference
    return LoadStatistics(*path.load_statistics(buckets.offsets))
