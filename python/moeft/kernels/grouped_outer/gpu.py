"""The grouped outer product on a GPU: the launch of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 32  # rows
WIDEST = 128  # columns of a tile, beside at most 64 of the other side


def grouped_outer(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    g_permutation: Tensor | None = None,
    x_permutation: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """As :func:`moeft.kernels.grouped_linear.grouped_outer`, scaled, summed in float32 and rounded once.

    Args:
        g: ``[R, F]``, or tokens with ``g_permutation``: row r is taken from ``g_permutation[r] // top_k``.
        x: ``[R, K]``, or tokens with ``x_permutation``.
        offsets: int32 ``[E + 1]``.
        scaling: Factor of the sum.
        dtype: Of the result, by default that of ``g``.
        g_permutation: int64 ``[R]`` or None.
        x_permutation: int64 ``[R]`` or None.
        top_k: Rows of a token.

    Returns:
        ``[E, F, K]``; zero for an expert without rows.
    """
    from moeft.kernels.grouped_outer import triton as kernels

    num_experts, f, k = offsets.numel() - 1, g.shape[1], x.shape[1]
    out = torch.empty(num_experts, f, k, dtype=dtype or g.dtype, device=g.device)
    f_tile, k_tile = _tile(f, 64 if f > k else 32), _tile(k, 32 if f > k else 64)
    if min(f, k) <= 64:  # a rank: the other side may be wide
        f_tile, k_tile = _tile(f, WIDEST), _tile(k, WIDEST)
    kernels.grouped_outer_kernel[(num_experts, -(-f // f_tile), -(-k // k_tile))](
        g.contiguous(),
        x.contiguous(),
        out,
        offsets,
        g_permutation,
        x_permutation,
        top_k,
        scaling,
        F=f,
        K=k,
        M=STEP,
        FT=f_tile,
        KT=k_tile,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out


def _tile(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))
