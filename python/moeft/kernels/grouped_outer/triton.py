"""Triton code for the sum of outer products over each expert's rows.

Shapes: R rows, E experts, F and K columns; M rows of a step, a tile of ``FT`` by ``KT``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeft.kernels.grouped_linear.triton import source_rows


@triton.jit
def grouped_outer_kernel(
    g, x, out, offsets, g_permutation, x_permutation, top_k, scaling,
    F: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FT: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """One tile of ``out[e] = scaling * g[rows of e]^T @ x[rows of e]``, ``[E, F, K]``; zero without rows.

    Rows of an operand with a permutation are gathered from token ``permutation[r] // top_k``.
    """
    expert = tl.program_id(0)
    f = tl.program_id(1) * FT + tl.arange(0, FT)
    k = tl.program_id(2) * KT + tl.arange(0, KT)
    stop = tl.load(offsets + expert + 1)
    total = tl.zeros((FT, KT), tl.float32)
    for start in range(tl.load(offsets + expert), stop, M):
        rows = start + tl.arange(0, M)
        mask = rows < stop
        g_place = source_rows(rows, mask, g_permutation, top_k)[:, None] * F + f[None, :]
        x_place = source_rows(rows, mask, x_permutation, top_k)[:, None] * K + k[None, :]
        left = tl.load(g + g_place, mask=mask[:, None] & (f < F)[None, :], other=0.0)
        right = tl.load(x + x_place, mask=mask[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(left.T, right.to(left.dtype), total, input_precision="ieee")
    out += expert.to(tl.int64) * (F * K) + f[:, None] * K + k[None, :]
    tl.store(out, (total * scaling).to(out.dtype.element_ty), mask=(f < F)[:, None] & (k < K)[None, :])
