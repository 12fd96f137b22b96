"""Triton code of the expert block: gate, up and activation in one product; the activation's backward; the combine.

Shapes: R rows, E experts, H hidden, I expert hidden, k experts per token; M rows of a tile, N of its outputs, K inputs
of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeft.kernels.grouped_linear.triton import add_low_rank, source_rows, weight_tile

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(gate, GATE: tl.constexpr):
    """The activation of the gate and its derivative, float32. ``GATE`` is "silu" or "gelu_tanh"."""
    if GATE == "silu":
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:  # noqa: RET505 - Triton allows a return in a branch only if the other returns too
        inner = SQRT_2_OVER_PI * gate * (1 + CUBIC * gate * gate)
        half = tl.sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
        slope = SQRT_2_OVER_PI * (1 + 3 * CUBIC * gate * gate)
        return gate * half, half + 2 * gate * half * (1 - half) * slope


@triton.jit(do_not_specialize=["first_expert", "stop_expert"])
def gated_linear_kernel(
    x, h, act, tiles, offsets, permutation, top_k, first_expert, stop_expert,
    weight, absmax, absmax2, nested_offset, dynamic_map, codes,
    low, factor, scaling,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr, GATE: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Tiles of gate and up of ``x @ W^T + scaling * low @ factor`` and of ``act = f(gate) * up``; W is ``[2I, H]``.

    ``h [R, 2I]`` keeps gate and up for backward unless it is None. Experts and gathering as in
    ``grouped_linear_kernel``.
    """
    PARTS: tl.constexpr = (INNER + N - 1) // N
    number = tl.program_id(0) // PARTS
    expert = tl.load(tiles + 2 * number).to(tl.int64)
    if (expert >= first_expert) & (expert < stop_expert):
        rows = tl.load(tiles + 2 * number + 1) + tl.arange(0, M)
        row_mask = rows < tl.load(offsets + expert + 1)
        in_weight = expert
        if absmax is None:
            in_weight = expert - first_expert
        out = (tl.program_id(0) % PARTS) * N + tl.arange(0, N)
        out_mask = out < INNER
        values = codes
        if codes is not None:
            values = tl.load(codes + tl.arange(0, 16))
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        source = x + (source_rows(rows, row_mask, permutation, top_k) * HIDDEN)[:, None]
        for start in range(0, HIDDEN, K):
            inner = start + tl.arange(0, K)
            left = tl.load(source + inner[None, :], mask=row_mask[:, None] & (inner < HIDDEN)[None, :], other=0.0)
            gate_tile = weight_tile(
                weight, absmax, absmax2, nested_offset, dynamic_map, values, in_weight, out, out_mask, start,
                2 * INNER, HIDDEN, BLOCK_SIZE, N, K,
            )  # fmt: skip
            gate = tl.dot(left, gate_tile.to(left.dtype).T, gate, input_precision="ieee")
            up_tile = weight_tile(
                weight, absmax, absmax2, nested_offset, dynamic_map, values, in_weight, out + INNER, out_mask, start,
                2 * INNER, HIDDEN, BLOCK_SIZE, N, K,
            )  # fmt: skip
            up = tl.dot(left, up_tile.to(left.dtype).T, up, input_precision="ieee")
        rows = rows.to(tl.int64)
        if RANK > 0:
            gate = add_low_rank(
                gate, low, factor, expert, rows, row_mask, out, out_mask, scaling,
                RANK, RANKS, RANK, 1, 2 * INNER * RANK,
            )  # fmt: skip
            up = add_low_rank(
                up, low, factor + INNER * RANK, expert, rows, row_mask, out, out_mask, scaling,
                RANK, RANKS, RANK, 1, 2 * INNER * RANK,
            )  # fmt: skip
        # The activation of what backward will read: rounded once.
        gate = gate.to(act.dtype.element_ty)
        up = up.to(act.dtype.element_ty)
        mask = row_mask[:, None] & out_mask[None, :]
        if h is not None:
            place = h + rows[:, None] * (2 * INNER) + out[None, :]
            tl.store(place, gate, mask=mask)
            tl.store(place + INNER, up, mask=mask)
        activated, _ = activate(gate.to(tl.float32), GATE)
        product = activated * up.to(tl.float32)
        tl.store(act + rows[:, None] * INNER + out[None, :], product.to(act.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(h, act, INNER: tl.constexpr, GATE: tl.constexpr, SIZE: tl.constexpr):
    """A row of ``act [R, I] = f(gate) * up`` of ``h [R, 2I]``."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, INNER, SIZE):
        column = start + tl.arange(0, SIZE)
        mask = column < INNER
        gate = tl.load(h + row * (2 * INNER) + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + row * (2 * INNER) + INNER + column, mask=mask, other=0.0).to(tl.float32)
        activated, _ = activate(gate, GATE)
        tl.store(act + row * INNER + column, (activated * up).to(act.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    h, grad_act, grad_h, act, low, weighted_low, weights, grad_weights, permutation,
    INNER: tl.constexpr, GATE: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A row of ``grad_h``, and the gradient ``<grad_act, act>`` of its routing weight.

    ``grad_act`` is that of a routing weight of one. ``weights`` and ``grad_weights`` are in the order of the tokens.
    Unless ``act`` is None, it becomes the row that the gradients of the low-rank factors need: times its weight, and so
    is ``weighted_low`` of ``low [R, r]``.
    """
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(permutation + row)
    weight = tl.load(weights + choice).to(tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, INNER, SIZE):
        column = start + tl.arange(0, SIZE)
        mask = column < INNER
        gate = tl.load(h + row * (2 * INNER) + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + row * (2 * INNER) + INNER + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_act + row * INNER + column, mask=mask, other=0.0).to(tl.float32)
        activated, slope = activate(gate, GATE)
        product = (activated * up).to(grad_h.dtype.element_ty)
        total += grad * product.to(tl.float32)
        grad *= weight
        place = grad_h + row * (2 * INNER) + column
        tl.store(place, (grad * up * slope).to(grad_h.dtype.element_ty), mask=mask)
        tl.store(place + INNER, (grad * activated).to(grad_h.dtype.element_ty), mask=mask)
        if act is not None:
            weighted = (product.to(tl.float32) * weight).to(act.dtype.element_ty)
            tl.store(act + row * INNER + column, weighted, mask=mask)
    if act is not None:
        rank = tl.arange(0, RANKS)
        place = row * RANK + rank
        value = tl.load(low + place, mask=rank < RANK, other=0.0).to(tl.float32) * weight
        tl.store(weighted_low + place, value.to(weighted_low.dtype.element_ty), mask=rank < RANK)
    tl.store(grad_weights + choice, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


@triton.jit
def combine_kernel(y, out, inverse, weights, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr):
    """Part of a token's sum over its rows of ``y [R, H]``, in the order of its choices; without weights a plain sum."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = column < HIDDEN
    total = tl.zeros((SIZE,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + choice)
        value = tl.load(y + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)
