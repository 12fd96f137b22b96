"""Triton code for NF4 and FP4: the kernel that restores a weight, and the tiles that kernels of products restore.

Pointers: ``packed`` uint8 codes; ``absmax`` float32, or uint8 codes with ``absmax2``, ``offset`` and ``dynamic_map`` of
a double-quantised weight, else None; ``codes`` the sixteen values, float32.

Launch with ``enable_fp_fusion=False``: a fused multiply-add would change bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

NESTED_BLOCK = tl.constexpr(256)


@triton.jit
def scales(absmax, absmax2, offset, dynamic_map, block, mask):
    """First-level statistics of blocks, counted over the whole stack: float32 in the shape of ``block``."""
    stored = tl.load(absmax + block, mask=mask, other=0)
    if absmax2 is not None:
        value = tl.load(dynamic_map + stored.to(tl.int32), mask=mask, other=0.0)
        stored = value * tl.load(absmax2 + block // NESTED_BLOCK, mask=mask, other=0.0) + tl.load(offset)
    return stored


@triton.jit
def lookup(codes, index):
    """The value of every index, float32 in its shape. ``codes`` lies in registers: a shuffle, not a load."""
    return tl.reshape(tl.gather(codes, tl.reshape(index.to(tl.int32), [index.numel]), 0), index.shape)


@triton.jit
def tile(
    packed, absmax, absmax2, offset, dynamic_map, codes, expert, row, row_mask, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of an expert's ``[ROWS, COLUMNS]`` from a column on, ``[HEIGHT, WIDTH]`` float32; 0 where masked.

    ``expert`` is int64, ``codes`` a tensor. Where no run of 64 values crosses a row or a block, 64 values share a load
    of their scale; any other weight looks up each value on its own, which is slow and rare.
    """
    ELEMENTS: tl.constexpr = ROWS * COLUMNS
    BLOCKS: tl.constexpr = (ELEMENTS + BLOCK_SIZE - 1) // BLOCK_SIZE
    packed += expert * ((ELEMENTS + 1) // 2)
    if COLUMNS % 64 == 0 and BLOCK_SIZE % 64 == 0 and WIDTH % 64 == 0:
        RUNS: tl.constexpr = WIDTH // 64
        pair = column // 2 + tl.arange(0, WIDTH // 2)
        mask = row_mask[:, None] & (pair < COLUMNS // 2)[None, :]
        both = tl.load(packed + (row * (COLUMNS // 2))[:, None] + pair[None, :], mask=mask, other=0)
        # The even element of a pair is the high half of its byte.
        restored = lookup(codes, tl.join(both >> 4, both & 15))
        run = column + 64 * tl.arange(0, RUNS)
        block = expert * BLOCKS + ((row * COLUMNS)[:, None] + run[None, :]) // BLOCK_SIZE
        run_mask = row_mask[:, None] & (run < COLUMNS)[None, :]
        scale = scales(absmax, absmax2, offset, dynamic_map, block, run_mask)
        restored = tl.reshape(restored, [HEIGHT, RUNS, 64]) * scale[:, :, None]
        return tl.reshape(restored, [HEIGHT, WIDTH])
    else:  # noqa: RET505 - Triton allows a return in a branch only if the other returns too
        columns = column + tl.arange(0, WIDTH)
        mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
        element = (row * COLUMNS)[:, None] + columns[None, :]
        both = tl.load(packed + element // 2, mask=mask, other=0)
        nibble = tl.where(element % 2 == 0, both >> 4, both & 15)
        block = expert * BLOCKS + element // BLOCK_SIZE
        scale = scales(absmax, absmax2, offset, dynamic_map, block, mask)
        return tl.where(mask, lookup(codes, nibble) * scale, 0.0)


@triton.jit(do_not_specialize=["first_group"])
def dequantize_kernel(
    out, packed, absmax, absmax2, offset, dynamic_map, codes, first_group,
    GROUP_LEN: tl.constexpr, BLOCK_SIZE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Restore ``SIZE`` elements of group ``first_group + program_id(1)``; ``out`` begins with ``first_group``."""
    local = tl.program_id(1).to(tl.int64)
    values = tl.load(codes + tl.arange(0, 16))
    first = tl.program_id(0).to(tl.int64) * SIZE
    # A group is one row, so that 64 elements share a load of their scale.
    row = tl.arange(0, 1)
    restored = tile(
        packed, absmax, absmax2, offset, dynamic_map, values, first_group + local, row, row == 0, first,
        1, GROUP_LEN, BLOCK_SIZE, 1, SIZE,
    )  # fmt: skip
    element = first + tl.arange(0, SIZE)
    restored = tl.reshape(restored, [SIZE]).to(out.dtype.element_ty)
    tl.store(out + local * GROUP_LEN + element, restored, mask=element < GROUP_LEN)
