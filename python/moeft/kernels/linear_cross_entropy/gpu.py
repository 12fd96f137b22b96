"""Log-probabilities of labels under a linear head on a GPU, a chunk of rows at a time, without waiting for the device.

Shapes: N rows, C rows of a chunk, H hidden, V vocabulary.

As in ``function.py`` the gradient of the hidden states is formed in the forward for a coefficient of one. Which rows
count is known on the device only, so all of them go through the head. One buffer in the dtype of the rows holds a
chunk's logits and then their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.linear_cross_entropy.reference import IGNORE_INDEX
from moeft.kernels.out_of_memory import naming

CHUNK_ELEMENTS = 1 << 27  # logits of a chunk: 256 MiB in bfloat16, 512 rows of a vocabulary of 256 Ki
MOST_CHUNK_ROWS = 4096
SIZE = 4096  # logits of a row that a program holds at once
WARPS = 16


class LinearLogProbs(torch.autograd.Function):
    """Forward and backward of :func:`moeft.kernels.linear_log_probs` over all rows, float32 ``[N]``."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        chunk_rows: int | None,
        with_gradient: bool,
    ) -> Tensor:
        needs_hidden, needs_head = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        log_probs_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32)
        unit_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        head = head_VH.to(hidden_NH.dtype)
        for rows, logits_CV in _chunks(hidden_NH, head, chunk_rows):
            _log_probs(logits_CV, labels_N[rows], log_probs_N[rows], None, softcap, needs_hidden)
            if unit_NH is not None:
                torch.mm(logits_CV, head, out=unit_NH[rows])
        ctx.save_for_backward(unit_NH, *((hidden_NH, head_VH, labels_N) if needs_head else ()))
        ctx.options = (softcap, chunk_rows)
        return log_probs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        unit_NH, *rows_and_head = ctx.saved_tensors
        # In float32: 1 / count and the scale of a gradient scaler do not fit 16 bits.
        grad_hidden = None if unit_NH is None else (unit_NH * grad_N[:, None]).to(unit_NH.dtype)
        grad_head = None
        if rows_and_head:
            hidden_NH, head_VH, labels_N = rows_and_head
            softcap, chunk_rows = ctx.options
            grad_head = torch.zeros_like(head_VH, dtype=torch.float32)
            scratch = torch.empty_like(grad_N)
            grad_N = grad_N.contiguous()
            for rows, logits_CV in _chunks(hidden_NH, head_VH.to(hidden_NH.dtype), chunk_rows):
                _log_probs(logits_CV, labels_N[rows], scratch[rows], grad_N[rows], softcap, True)
                grad_head += logits_CV.mT @ hidden_NH[rows]
            grad_head = grad_head.to(head_VH.dtype)
        return grad_hidden, grad_head, None, None, None, None


def _chunks(hidden_NH: Tensor, head_VH: Tensor, chunk_rows: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits, in one buffer for all chunks."""
    rows, vocabulary = hidden_NH.shape[0], head_VH.shape[0]
    chunk_rows = chunk_rows or max(1, min(MOST_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))
    with naming("the loss head", f"chunk_rows below {min(chunk_rows, rows)} makes a chunk of its logits smaller"):
        buffer = hidden_NH.new_empty(min(chunk_rows, rows), vocabulary)
    for start in range(0, rows, chunk_rows):
        part = slice(start, start + chunk_rows)
        hidden_CH = hidden_NH[part]
        logits_CV = buffer[: hidden_CH.shape[0]]
        torch.mm(hidden_CH, head_VH.mT, out=logits_CV)
        yield part, logits_CV


def _log_probs(
    logits_CV: Tensor, labels: Tensor, out: Tensor, coefficients: Tensor | None, softcap: float | None, gradient: bool
) -> None:
    from moeft.kernels.linear_cross_entropy import triton as kernels

    rows, vocabulary = logits_CV.shape
    kernels.log_probs_kernel[(rows,)](
        logits_CV, labels, out, coefficients, softcap or 1.0, IGNORE_INDEX,
        V=vocabulary, SOFTCAP=softcap is not None, GRADIENT=gradient,
        SIZE=min(SIZE, max(16, 1 << (vocabulary - 1).bit_length())), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
