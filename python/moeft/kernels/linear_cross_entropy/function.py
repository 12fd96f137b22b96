"""Log-probabilities of labels under a linear head, a chunk of rows at a time.

Shapes: M rows that count, C rows of a chunk, H hidden, V vocabulary.

The gradient of a row's log-probability with respect to its hidden state is formed while the row's logits are in memory,
for a coefficient of one. Backward only scales it, so the head is passed twice and not three times, and a loss whose
coefficients are known after the log-probabilities, such as that of preference pairs, needs no second pass either. The
gradient of a head that trains cannot be kept for each row: backward forms it from the logits, computed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.dispatch import in_core
from moeft.kernels.linear_cross_entropy import cpu, pytorch

TILE_ELEMENTS = 1 << 22  # of a head that is cast to float32 on the CPU: 16 MiB


class LinearLogProbs(torch.autograd.Function):
    """Forward and backward of :func:`moeft.kernels.linear_log_probs` over rows that count."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden_MH: Tensor,
        head_VH: Tensor,
        targets_M: Tensor,
        softcap: float | None,
        chunk_rows: int,
        with_gradient: bool,
    ) -> Tensor:
        dtype = compute_dtype(hidden_MH)
        log_probs_M = hidden_MH.new_empty(hidden_MH.shape[0], dtype=dtype)
        unit_MH = torch.empty_like(hidden_MH) if with_gradient and ctx.needs_input_grad[0] else None
        for rows, log_probs_C, grad_CV in _chunks(hidden_MH, head_VH, targets_M, softcap, chunk_rows):
            log_probs_M[rows] = log_probs_C
            if unit_MH is not None:
                unit_MH[rows] = _times_head(grad_CV, head_VH, hidden_MH.dtype)
        trained_head = with_gradient and ctx.needs_input_grad[1]
        ctx.save_for_backward(unit_MH, *((hidden_MH, head_VH, targets_M) if trained_head else ()))
        ctx.options = (softcap, chunk_rows)
        return log_probs_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        unit_MH, *rows_and_head = ctx.saved_tensors
        # In float32: 1 / count and the scale of a gradient scaler do not fit 16 bits.
        grad_hidden = None if unit_MH is None else (unit_MH * grad_M[:, None]).to(unit_MH.dtype)
        grad_head = None
        if rows_and_head:
            hidden_MH, head_VH, targets_M = rows_and_head
            softcap, chunk_rows = ctx.options
            grad_head = _head_gradient(hidden_MH, head_VH, targets_M, softcap, chunk_rows, grad_M)
        return grad_hidden, grad_head, None, None, None, None


def _head_gradient(
    hidden_MH: Tensor, head_VH: Tensor, targets_M: Tensor, softcap: float | None, chunk_rows: int, grad_M: Tensor
) -> Tensor:
    grad_head_VH = torch.zeros_like(head_VH, dtype=grad_M.dtype)
    for rows, _, grad_CV in _chunks(hidden_MH, head_VH, targets_M, softcap, chunk_rows):
        # On a GPU, in the dtype of the rows: its float32 products are slow.
        dtype = grad_M.dtype if grad_CV.is_cpu else hidden_MH.dtype
        grad_head_VH += grad_CV.mul_(grad_M[rows, None]).to(dtype).mT @ hidden_MH[rows].to(dtype)
    return grad_head_VH.to(head_VH.dtype)


def _chunks(
    hidden_MH: Tensor, head_VH: Tensor, targets_M: Tensor, softcap: float | None, chunk_rows: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their log-probabilities, and the gradient of each with respect to its logits before the soft cap.

    The same buffers of ``chunk_rows * V`` serve all chunks, one in the core and two elsewhere; a gradient is valid
    until the next chunk.
    """
    shape = (min(chunk_rows, hidden_MH.shape[0]), head_VH.shape[0])
    log_probs_and_gradient = cpu.log_probs_and_gradient if in_core(hidden_MH) else pytorch.LogProbsAndGradient()
    logits_CV = hidden_MH.new_empty(shape, dtype=compute_dtype(hidden_MH))
    for start in range(0, hidden_MH.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        targets_C = targets_M[rows]
        logits_of_rows_CV = logits_CV[: len(targets_C)]
        write_logits(hidden_MH[rows], head_VH, logits_of_rows_CV)
        yield rows, *log_probs_and_gradient(logits_of_rows_CV, targets_C, softcap)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Float32, and float64 for float64 rows."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def write_logits(hidden_CH: Tensor, head_VH: Tensor, out_CV: Tensor) -> None:
    """Write the logits of a chunk of rows, before a soft cap, into a float32 (or float64) buffer."""
    if hidden_CH.is_cpu:
        hidden_CH = hidden_CH.to(out_CV.dtype)
        for tile in _tiles(head_VH):
            torch.mm(hidden_CH, head_VH[tile].to(out_CV.dtype).mT, out=out_CV[:, tile])
    else:
        out_CV.copy_(hidden_CH @ head_VH.to(hidden_CH.dtype).mT)


def _times_head(grad_CV: Tensor, head_VH: Tensor, dtype: torch.dtype) -> Tensor:
    if not grad_CV.is_cpu:
        return grad_CV.to(dtype) @ head_VH.to(dtype)
    product_CH = grad_CV.new_zeros(grad_CV.shape[0], head_VH.shape[1])
    for tile in _tiles(head_VH):
        product_CH.addmm_(grad_CV[:, tile], head_VH[tile].to(grad_CV.dtype))
    return product_CH


def _tiles(head_VH: Tensor) -> Iterator[slice]:
    """Rows of the head that are cast at a time on the CPU.

    Without 16-bit matrix instructions, float32 products of a head that is cast in tiles were 4 times as fast as bf16
    products forward and 30 times backward (AMD EPYC, AVX2).
    """
    rows = max(1, TILE_ELEMENTS // head_VH.shape[1])
    return (slice(start, start + rows) for start in range(0, head_VH.shape[0], rows))
