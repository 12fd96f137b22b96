"""Triton code for products of rows sorted by expert with that expert's weight.

Shapes: R rows, E experts; a weight is stored as ``[ROWS, COLUMNS]`` and packed along its columns. M rows of a tile, N
outputs of a tile, K inputs of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeft.kernels.nf4.triton import tile as packed_tile


@triton.jit
def tile_map_kernel(offsets, tiles, num_tiles, E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr):
    """Expert and first row of every tile: int32 ``[num_tiles, 2]``. Surplus tiles get the expert E."""
    expert = tl.arange(0, EP)
    start = tl.load(offsets + expert, mask=expert < E, other=0)
    stop = tl.load(offsets + expert + 1, mask=expert < E, other=0)
    count = (stop - start + M - 1) // M
    last = tl.cumsum(count, 0)
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mine = tl.sum(((last[None, :] <= index[:, None]) & (expert < E)[None, :]).to(tl.int32), 1)
    is_mine = expert[None, :] == mine[:, None]
    first_tile = tl.sum(tl.where(is_mine, (last - count)[None, :], 0), 1)
    row = tl.sum(tl.where(is_mine, start[None, :], 0), 1) + (index - first_tile) * M
    mask = index < num_tiles
    tl.store(tiles + 2 * index, mine, mask=mask)
    tl.store(tiles + 2 * index + 1, row, mask=mask)


@triton.jit
def source_rows(rows, mask, permutation, top_k):
    """Where the rows of a tile come from: themselves, or with a permutation the token of each. int64."""
    if permutation is None:
        return rows.to(tl.int64)
    else:  # noqa: RET505 - Triton allows a return in a branch only if the other returns too
        return tl.load(permutation + rows, mask=mask, other=0) // top_k


@triton.jit
def weight_tile(
    weight, absmax, absmax2, nested_offset, dynamic_map, codes, expert, row, row_mask, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of an expert's weight from a column on, ``[HEIGHT, WIDTH]``; 0 where masked. ``absmax`` None: dense."""
    if absmax is None:
        columns = column + tl.arange(0, WIDTH)
        mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
        place = expert * (ROWS * COLUMNS) + (row * COLUMNS)[:, None] + columns[None, :]
        return tl.load(weight + place, mask=mask, other=0.0)
    else:  # noqa: RET505
        return packed_tile(
            weight, absmax, absmax2, nested_offset, dynamic_map, codes, expert, row, row_mask, column,
            ROWS, COLUMNS, BLOCK_SIZE, HEIGHT, WIDTH,
        )  # fmt: skip


@triton.jit
def add_low_rank(
    total, low, factor, expert, rows, row_mask, out, out_mask, scaling,
    RANK: tl.constexpr, RANKS: tl.constexpr, OUT_STRIDE: tl.constexpr, RANK_STRIDE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add ``scaling * low @ factor`` to a tile: ``low [R, RANK]``, ``factor`` of E experts, ``SIZE`` elements each.

    A large rank goes in parts, since a tile as wide as it would not fit shared memory.
    """
    STEP: tl.constexpr = min(RANKS, 32)
    product = tl.zeros_like(total)
    for first in tl.range(0, RANKS, STEP, num_stages=1):
        rank = first + tl.arange(0, STEP)
        mask = rank < RANK
        left = tl.load(low + (rows * RANK)[:, None] + rank[None, :], mask=row_mask[:, None] & mask[None, :], other=0.0)
        place = expert * SIZE + (out * OUT_STRIDE)[None, :] + (rank * RANK_STRIDE)[:, None]
        right = tl.load(factor + place, mask=mask[:, None] & out_mask[None, :], other=0.0)
        product = tl.dot(left, right.to(left.dtype), product, input_precision="ieee")
    return total + product * scaling


@triton.jit(do_not_specialize=["first_expert", "stop_expert"])
def grouped_linear_kernel(
    x, y, tiles, offsets, permutation, top_k, first_expert, stop_expert,
    weight, absmax, absmax2, nested_offset, dynamic_map, codes,
    low, factor, scaling,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TRANSPOSE: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of ``y = x @ W^T + scaling * low @ factor``; ``x @ W`` with ``TRANSPOSE``.

    Only tiles of the experts from ``first_expert`` up to ``stop_expert`` are computed; a dense ``weight`` begins with
    the first of these, packed codes with expert 0. With a ``permutation``, row r of ``x`` is gathered from token
    ``permutation[r] // top_k``. ``factor`` is ``[E, out, r]``, or ``[E, r, out]`` with ``TRANSPOSE``. With ``ADD``
    there is no product with a weight: ``y`` holds it already.
    """
    INNER: tl.constexpr = ROWS if TRANSPOSE else COLUMNS
    OUTER: tl.constexpr = COLUMNS if TRANSPOSE else ROWS
    # Outputs change fastest: programs that run together share rows and an expert's weight in the cache.
    PARTS: tl.constexpr = (OUTER + N - 1) // N
    number = tl.program_id(0) // PARTS
    expert = tl.load(tiles + 2 * number).to(tl.int64)
    if (expert >= first_expert) & (expert < stop_expert):
        rows = tl.load(tiles + 2 * number + 1) + tl.arange(0, M)
        row_mask = rows < tl.load(offsets + expert + 1)
        in_weight = expert
        if absmax is None:
            in_weight = expert - first_expert
        first = (tl.program_id(0) % PARTS) * N
        out = first + tl.arange(0, N)
        out_mask = out < OUTER
        place = y + rows.to(tl.int64)[:, None] * OUTER + out[None, :]
        y_mask = row_mask[:, None] & out_mask[None, :]
        if ADD:
            total = tl.load(place, mask=y_mask, other=0.0).to(tl.float32)
        else:
            total = tl.zeros((M, N), tl.float32)
            values = codes
            if codes is not None:
                values = tl.load(codes + tl.arange(0, 16))
            source = x + (source_rows(rows, row_mask, permutation, top_k) * INNER)[:, None]
            for start in range(0, INNER, K):
                inner = start + tl.arange(0, K)
                inner_mask = inner < INNER
                left = tl.load(source + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
                if TRANSPOSE:
                    right = weight_tile(
                        weight, absmax, absmax2, nested_offset, dynamic_map, values, in_weight,
                        inner, inner_mask, first, ROWS, COLUMNS, BLOCK_SIZE, K, N,
                    ).to(left.dtype)  # fmt: skip
                else:
                    right = weight_tile(
                        weight, absmax, absmax2, nested_offset, dynamic_map, values, in_weight, out, out_mask, start,
                        ROWS, COLUMNS, BLOCK_SIZE, N, K,
                    ).to(left.dtype).T  # fmt: skip
                total = tl.dot(left, right, total, input_precision="ieee")
        if RANK > 0:
            total = add_low_rank(
                total, low, factor, expert, rows.to(tl.int64), row_mask, out, out_mask, scaling,
                RANK, RANKS, 1 if TRANSPOSE else RANK, OUTER if TRANSPOSE else 1, RANK * OUTER,
            )  # fmt: skip
        tl.store(place, total.to(y.dtype.element_ty), mask=y_mask)
