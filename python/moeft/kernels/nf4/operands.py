"""A weight as PyTorch's operators take it, which know no objects: its tensors, its sizes and its codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeft.kernels.nf4.weight import NestedStatistics, NF4Weight


def flatten(weight: NF4Weight | Tensor) -> tuple[list[Tensor], list[int], str]:
    """Tensors (a dense weight; codes and absmax; or with nested absmax and offset), shape and block size, codebook."""
    if isinstance(weight, Tensor):
        return [weight], [*weight.shape, 0], "nf4"
    nested = [] if weight.nested is None else [weight.nested.absmax, weight.nested.offset]
    return [weight.packed, weight.absmax, *nested], [*weight.shape, weight.block_size], weight.codebook


def unflatten(tensors: Sequence[Tensor], sizes: Sequence[int], codebook: str) -> NF4Weight | Tensor:
    """The inverse of :func:`flatten`."""
    if len(tensors) == 1:
        return tensors[0]
    packed, absmax, *nested = tensors
    *shape, block_size = sizes
    statistics = NestedStatistics(*nested) if nested else None
    return NF4Weight(packed, absmax, torch.Size(shape), block_size, statistics, "nf4" if codebook == "nf4" else "fp4")
