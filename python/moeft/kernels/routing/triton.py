"""Triton code of routing: histogram, scan and scatter of a stable counting sort.

Shapes: R rows, E experts (``EP`` the next power of two), C rows of a chunk, S chunks (``SP``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chosen(index, rows, num_rows, E: tl.constexpr):
    """Expert of every row, int32, and -1 beyond the last row. What is out of range goes to the nearest expert."""
    expert = tl.load(index + rows, mask=rows < num_rows, other=0).to(tl.int32)
    return tl.where(rows < num_rows, tl.minimum(tl.maximum(expert, 0), E - 1), -1)


@triton.jit
def histogram_kernel(index, counts, num_rows, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, SP: tl.constexpr):
    """Rows of each expert in a chunk: a column of ``counts [EP, SP]``."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EP)
    mine = chosen(index, chunk * C + tl.arange(0, C), num_rows, E)
    count = tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + expert * SP + chunk, count)


@triton.jit
def scan_kernel(counts, totals, num_chunks, SP: tl.constexpr):
    """For one expert: rows in earlier chunks instead of rows in a chunk, and rows in all."""
    expert = tl.program_id(0)
    chunk = tl.arange(0, SP)
    count = tl.load(counts + expert * SP + chunk, mask=chunk < num_chunks, other=0)
    tl.store(counts + expert * SP + chunk, tl.cumsum(count, 0) - count)
    tl.store(totals + expert, tl.sum(count, 0))


@triton.jit
def scatter_kernel(
    index, counts, totals, permutation, inverse, offsets, num_rows,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Sorted position of a chunk's rows: the expert's start, rows in earlier chunks, rows before it in its own."""
    chunk = tl.program_id(0)
    rows = chunk * C + tl.arange(0, C)
    expert = tl.arange(0, EP)
    total = tl.load(totals + expert)
    stop = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + expert, stop, mask=expert < E)
    is_mine = chosen(index, rows, num_rows, E)[:, None] == expert[None, :]
    before = tl.cumsum(is_mine.to(tl.int32), 0) - 1
    first = stop - total + tl.load(counts + expert * SP + chunk)
    position = tl.sum(tl.where(is_mine, before + first[None, :], 0), 1).to(tl.int64)
    mask = rows < num_rows
    tl.store(inverse + rows, position, mask=mask)
    tl.store(permutation + position, rows.to(tl.int64), mask=mask)
