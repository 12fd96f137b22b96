"""Routing on a GPU: three launches of Triton kernels, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.power_of_two import power_of_two

CHUNK_ELEMENTS = 1 << 14  # rows of a chunk times experts: what a program of 8 warps holds in registers
WARPS = 8


@torch.library.custom_op("moeft::bucket", mutates_args=())
def bucket(top_k_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moeft.kernels.routing.reference.bucket`, opaque to ``torch.compile``."""
    return sort_rows(top_k_index_R, num_experts)


@bucket.register_fake
def _(top_k_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    permutation = torch.empty_like(top_k_index_R, dtype=torch.int64)
    return permutation, torch.empty_like(permutation), top_k_index_R.new_empty(num_experts + 1, dtype=torch.int32)


def sort_rows(top_k_index_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels of :func:`bucket`."""
    from moeft.kernels.routing import triton as kernels

    rows, device = top_k_index_R.numel(), top_k_index_R.device
    permutation = torch.empty(rows, dtype=torch.int64, device=device)
    inverse = torch.empty_like(permutation)
    if not rows:
        return permutation, inverse, torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    top_k_index_R = top_k_index_R.contiguous()
    experts = max(2, power_of_two(num_experts))
    chunk = max(16, CHUNK_ELEMENTS // experts)
    chunks = -(-rows // chunk)
    slots = max(16, power_of_two(chunks))
    counts = torch.empty(experts, slots, dtype=torch.int32, device=device)
    totals = torch.empty(experts, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    sizes = {"E": num_experts, "EP": experts, "C": chunk, "SP": slots, "num_warps": WARPS, "enable_fp_fusion": False}
    kernels.histogram_kernel[(chunks,)](top_k_index_R, counts, rows, **sizes)
    kernels.scan_kernel[(experts,)](counts, totals, chunks, SP=slots, num_warps=WARPS, enable_fp_fusion=False)
    kernels.scatter_kernel[(chunks,)](top_k_index_R, counts, totals, permutation, inverse, offsets, rows, **sizes)
    return permutation, inverse, offsets
