"""The expert block on a GPU: launches of Triton kernels, without waiting for the device.

Shapes: T tokens, k experts per token, R = T * k rows sorted by expert, E experts, H hidden, I expert hidden, r rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeft.kernels.experts.lora import join_b, split_a, split_b
from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear.gpu import LowRank, Tiles, chunks, grouped_linear
from moeft.kernels.grouped_outer.gpu import grouped_outer
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.power_of_two import power_of_two
from moeft.kernels.routing import Buckets

WIDEST_COLUMNS = 1024  # of a row that a program holds at once

GATES = ("silu", "gelu_tanh")


class Factors(NamedTuple):
    """Low-rank factors of a stack in PEFT's layout, with their scaling."""

    a: Tensor  # [E * r, in]
    b: Tensor  # [out, r * E]
    scaling: float


class Saved(NamedTuple):
    """What backward needs of a forward pass, beside its inputs."""

    h: Tensor  # [R, 2I], input of the activation; empty where no gradient is needed
    low_up: Tensor  # [R, r], rows through A of gate_up; empty without factors
    low_down: Tensor  # [R, r]


class Gradients(NamedTuple):
    """Gradients of an expert block; empty where there are no factors."""

    x: Tensor
    weights: Tensor
    a_up: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor


def forward(
    x_TH: Tensor,
    weight_Tk: Tensor,
    gate_up: NF4Weight | Tensor,
    down: NF4Weight | Tensor,
    up_factors: Factors | None,
    down_factors: Factors | None,
    buckets: Buckets,
    gate: str,
    keep: bool,
) -> tuple[Tensor, Saved]:
    """Output ``[T, H]`` and, if ``keep``, what backward needs. ``gate`` is one of :data:`GATES`."""
    top_k = weight_Tk.shape[1]
    tiles = Tiles.of(buckets.offsets, weight_Tk.numel())
    x_TH = x_TH.contiguous()
    low_up = _reduce(x_TH, up_factors, tiles, buckets.permutation, top_k)
    h_R2I, act_RI = _gated(x_TH, gate_up, low_up, tiles, buckets.permutation, top_k, gate, keep)
    low_down = _reduce(act_RI, down_factors, tiles, None, 1)
    y_RH = grouped_linear(act_RI, down, tiles, low_rank=low_down)
    out_TH = combine(y_RH, buckets.inverse, weight_Tk, top_k)
    return out_TH, Saved(
        x_TH.new_empty(0) if h_R2I is None or not keep else h_R2I,
        low_up.rows if low_up and keep else x_TH.new_empty(0),
        low_down.rows if low_down and keep else x_TH.new_empty(0),
    )


def backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weight_Tk: Tensor,
    gate_up: NF4Weight | Tensor,
    down: NF4Weight | Tensor,
    up_factors: Factors | None,
    down_factors: Factors | None,
    buckets: Buckets,
    gate: str,
    saved: Saved,
) -> Gradients:
    """Every gradient, in the dtype of what it belongs to."""
    from moeft.kernels.experts import triton as kernels

    top_k, inner = weight_Tk.shape[1], saved.h.shape[-1] // 2
    rows = weight_Tk.numel()
    tiles = Tiles.of(buckets.offsets, rows)
    permutation, grad_TH, x_TH = buckets.permutation, grad_TH.contiguous(), x_TH.contiguous()

    # The gradient of row y is weight * grad: grad alone is carried, and what depends on it is scaled.
    g_low = _restore(grad_TH, down_factors, tiles, permutation, top_k)
    grad_act_RI = grouped_linear(
        grad_TH, down, tiles, transpose=True, permutation=permutation, top_k=top_k, low_rank=g_low
    )
    grad_h_R2I = torch.empty_like(saved.h)
    weighted_act_RI = torch.empty_like(grad_act_RI) if down_factors else None
    weighted_low_Rr = torch.empty_like(saved.low_down) if down_factors else None
    rank = saved.low_down.shape[1] if down_factors else 1
    weight_Tk = weight_Tk.contiguous()
    grad_weight_Tk = torch.empty_like(weight_Tk)
    if rows:
        kernels.activation_backward_kernel[(rows,)](
            saved.h, grad_act_RI, grad_h_R2I, weighted_act_RI, saved.low_down, weighted_low_Rr,
            weight_Tk, grad_weight_Tk, permutation,
            INNER=inner, GATE=gate, SIZE=_columns(inner), RANK=rank, RANKS=power_of_two(rank),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    del grad_act_RI  # what comes next is the largest of all: four times as wide
    # Tensors of their own: an operator's outputs may not share memory.
    grad_a_up, grad_b_up, grad_a_down, grad_b_down = (x_TH.new_empty(0) for _ in range(4))
    if down_factors and g_low and weighted_act_RI is not None and weighted_low_Rr is not None:
        rows_of_tokens = {"g_permutation": permutation, "top_k": top_k}
        grad_a_down = _grad_a(g_low.rows, weighted_act_RI, buckets.offsets, down_factors)
        grad_b_down = _grad_b(grad_TH, weighted_low_Rr, buckets.offsets, down_factors, **rows_of_tokens)
    del weighted_act_RI
    h_low = _restore(grad_h_R2I, up_factors, tiles, None, 1)
    grad_x_RH = grouped_linear(grad_h_R2I, gate_up, tiles, transpose=True, low_rank=h_low)
    grad_x_TH = combine(grad_x_RH, buckets.inverse, None, top_k)
    if up_factors and h_low:
        grad_a_up = _grad_a(h_low.rows, x_TH, buckets.offsets, up_factors, x_permutation=permutation, top_k=top_k)
        grad_b_up = _grad_b(grad_h_R2I, saved.low_up, buckets.offsets, up_factors)
    return Gradients(grad_x_TH, grad_weight_Tk, grad_a_up, grad_b_up, grad_a_down, grad_b_down)


def combine(y_RH: Tensor, inverse: Tensor, weight_Tk: Tensor | None, top_k: int) -> Tensor:
    """Sum of each token's rows, weighted or plain: ``[T, H]``, in the order of its choices and so deterministic."""
    from moeft.kernels.experts import triton as kernels

    hidden = y_RH.shape[1]
    out_TH = y_RH.new_empty(inverse.numel() // top_k, hidden)
    if out_TH.numel():
        size = _columns(hidden)
        weights = None if weight_Tk is None else weight_Tk.contiguous()
        kernels.combine_kernel[(out_TH.shape[0], -(-hidden // size))](
            y_RH, out_TH, inverse, weights, TOP_K=top_k, HIDDEN=hidden, SIZE=size, num_warps=4, enable_fp_fusion=False
        )
    return out_TH


def _gated(
    x_TH: Tensor,
    gate_up: NF4Weight | Tensor,
    low: LowRank | None,
    tiles: Tiles,
    permutation: Tensor,
    top_k: int,
    gate: str,
    keep: bool,
) -> tuple[Tensor | None, Tensor]:
    """``h [R, 2I]``, or None unless it is to be kept, and ``act [R, I]``."""
    from moeft.kernels.experts import triton as kernels

    _, rows_2I, hidden = gate_up.shape
    inner = rows_2I // 2
    act_RI = x_TH.new_empty(tiles.rows, inner)
    if not tiles.rows:
        return (x_TH.new_empty(0, rows_2I) if keep else None), act_RI
    path = config.path_of_weight(gate_up, tiles.rows, x_TH)
    if path == "grouped_mm":
        h_R2I = grouped_linear(
            x_TH, gate_up, tiles, permutation=permutation, top_k=top_k, low_rank=low, path="grouped_mm"
        )
        kernels.activation_kernel[(tiles.rows,)](
            h_R2I, act_RI, INNER=inner, GATE=gate, SIZE=_columns(inner), num_warps=4, enable_fp_fusion=False
        )
        return h_R2I, act_RI
    h_kept = x_TH.new_empty(tiles.rows, rows_2I) if keep else None
    kind = "gated_packed" if path == "fused" else "gated"
    launch = config.launch_of(kind, tiles.m, inner, hidden, x_TH)
    rank = low.rows.shape[1] if low else 0
    for first, stop, pointers in chunks(gate_up, path, x_TH.dtype):
        kernels.gated_linear_kernel[(tiles.map.shape[0] * -(-inner // launch.n),)](
            x_TH, h_kept, act_RI, tiles.map, tiles.offsets, permutation, top_k, first, stop, *pointers,
            low.rows if low else None, low.factor if low else None, low.scaling if low else 0.0,
            HIDDEN=hidden, INNER=inner, BLOCK_SIZE=getattr(gate_up, "block_size", 64), GATE=gate,
            RANK=rank, RANKS=max(16, power_of_two(rank)), M=tiles.m, N=launch.n, K=launch.k,
            num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return h_kept, act_RI


def _reduce(x: Tensor, factors: Factors | None, tiles: Tiles, permutation: Tensor | None, top_k: int) -> LowRank | None:
    """Rows through A, and B that they are to meet."""
    if factors is None:
        return None
    num_experts = tiles.offsets.numel() - 1
    a_ErK = split_a(factors.a.to(x.dtype), num_experts)
    rows = grouped_linear(x, a_ErK, tiles, permutation=permutation, top_k=top_k, path="workspace")
    return LowRank(rows, _by_expert(factors.b, num_experts, x.dtype), factors.scaling)


def _restore(
    g: Tensor, factors: Factors | None, tiles: Tiles, permutation: Tensor | None, top_k: int
) -> LowRank | None:
    """Gradient rows through the transpose of B, and A that they are to meet."""
    if factors is None:
        return None
    num_experts = tiles.offsets.numel() - 1
    b_EFr = _by_expert(factors.b, num_experts, g.dtype)
    rows = grouped_linear(g, b_EFr, tiles, transpose=True, permutation=permutation, top_k=top_k, path="workspace")
    return LowRank(rows, split_a(factors.a.to(g.dtype), num_experts), factors.scaling)


def _by_expert(b: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """A factor B as ``[E, out, r]``, cast and laid out in one copy."""
    return split_b(b, num_experts).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _grad_a(g_Rr: Tensor, x: Tensor, offsets: Tensor, factors: Factors, **rows: Any) -> Tensor:
    """``rows``: how :func:`grouped_outer` gathers them."""
    grad = grouped_outer(g_Rr, x, offsets, scaling=factors.scaling, dtype=factors.a.dtype, **rows)
    return grad.view(factors.a.shape)


def _grad_b(g: Tensor, low_Rr: Tensor, offsets: Tensor, factors: Factors, **rows: Any) -> Tensor:
    return join_b(grouped_outer(g, low_Rr, offsets, scaling=factors.scaling, dtype=factors.b.dtype, **rows))


def _columns(size: int) -> int:
    return min(WIDEST_COLUMNS, max(16, 1 << math.ceil(math.log2(size))))
