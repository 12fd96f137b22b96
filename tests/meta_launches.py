"""What the kernels launch at the shapes of gemma-4-26B-A4B, from tensors on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.experts import gpu
from moeft.kernels.linear_cross_entropy import gpu as head
from moeft.kernels.nf4 import NESTED_BLOCK, Layout, NestedStatistics, NF4Weight
from moeft.kernels.nf4 import gpu as nf4
from moeft.kernels.routing import Buckets
from moeft.kernels.routing import gpu as routing

EXPERTS, HIDDEN, INNER, TOP_K, RANK, VOCABULARY = 128, 2816, 704, 8, 16, 262144


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(*shape: int) -> NF4Weight:
    """A double-quantised weight without bytes."""
    layout = Layout.of(shape, 64)
    nested = NestedStatistics(
        empty(-(-layout.groups * layout.blocks // NESTED_BLOCK), dtype=torch.float32), empty(1, dtype=torch.float32)
    )
    return NF4Weight(
        empty(*layout.packed_shape(True), dtype=torch.uint8),
        empty(*layout.absmax_shape(True), dtype=torch.uint8),
        torch.Size(shape),
        64,
        nested,
    )


def expert_block(tokens: int, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> None:
    """Forward and backward of a layer's experts, with factors on both stacks."""
    rows = tokens * TOP_K
    buckets = Buckets(
        empty(rows, dtype=torch.int64), empty(rows, dtype=torch.int64), empty(EXPERTS + 1, dtype=torch.int32)
    )
    x, weights = empty(tokens, HIDDEN, dtype=dtype), empty(tokens, TOP_K, dtype=torch.float32)
    stacks = packed(EXPERTS, 2 * INNER, HIDDEN), packed(EXPERTS, HIDDEN, INNER)
    factors = [
        gpu.Factors(
            empty(EXPERTS * rank, columns, dtype=torch.float32), empty(rows, rank * EXPERTS, dtype=torch.float32), 0.5
        )
        for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    _, saved = gpu.forward(x, weights, *stacks, *factors, buckets, "gelu_tanh", True)
    gpu.backward(torch.empty_like(x), x, weights, *stacks, *factors, buckets, "gelu_tanh", saved)


def route(tokens: int) -> None:
    """Routing of a layer."""
    routing.sort_rows(empty(tokens * TOP_K, dtype=torch.int64), EXPERTS)


def restore() -> None:
    """A stack of experts from 4 bits."""
    nf4.dequantize(packed(EXPERTS, HIDDEN, INNER), empty(EXPERTS, HIDDEN, INNER))


def loss_head(tokens: int) -> None:
    """Loss and gradient of the hidden states."""
    hidden = empty(tokens, HIDDEN).requires_grad_()
    head.LinearLogProbs.apply(hidden, empty(VOCABULARY, HIDDEN), empty(tokens, dtype=torch.int64), 30.0, None, True)
