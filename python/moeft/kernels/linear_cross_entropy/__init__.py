"""Cross-entropy of a linear head without the logits of a whole batch in memory.

Shapes: N rows, H hidden, V vocabulary, M rows that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeft.kernels.linear_cross_entropy.reference import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "linear_cross_entropy"]

CHUNK_ROWS = 1024


def linear_cross_entropy(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum of the cross-entropy of ``softcap * tanh(hidden @ head^T / softcap)`` over the rows that count.

    Rows whose label is -100 are skipped before the matmul. The others go through the head ``chunk_rows`` at a time,
    and the gradient of ``hidden`` is formed in the same pass, so that no logits outlive a chunk. A head that requires
    a gradient gets one.

    Args:
        hidden: ``[N, H]`` or any leading shape, last hidden states.
        head_weight: ``[V, H]``.
        labels: Class of each row, int64, already shifted; -100 for rows that do not count.
        softcap: Soft cap of the logits, or None.
        chunk_rows: Rows of logits in memory at a time.

    Returns:
        Scalar float32 sum; 0 when no row counts.

    Raises:
        ValueError: If ``labels`` has another shape than ``hidden`` without its last axis.

    Source:
        Cut Cross-Entropy, https://arxiv.org/abs/2411.09009; the soft cap is that of Gemma 2 and later.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}")
    rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(-1)
    counted_MH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    targets_M = labels.reshape(-1).index_select(0, rows)
    return _LinearCrossEntropy.apply(counted_MH, head_weight, targets_M, softcap, chunk_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, head_VH: Tensor, targets_M: Tensor, softcap: float | None, chunk_rows: int
    ) -> Tensor:
        head_VH_cast = head_VH.to(hidden_MH.dtype)
        grad_hidden_MH = torch.empty_like(hidden_MH)
        grad_head_VH = torch.zeros_like(head_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = hidden_MH.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_MH.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden_MH[rows] @ head_VH_cast.mT).float()
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()
                logits = logits.mul_(softcap)
            log_z = logits.logsumexp(-1)
            targets = targets_M[rows, None]
            loss += (log_z - logits.gather(1, targets).squeeze(1)).sum()
            grad_logits = logits.sub_(log_z[:, None]).exp_()
            grad_logits.scatter_add_(1, targets, grad_logits.new_full(targets.shape, -1.0))
            if softcap is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden_MH.dtype)
            torch.mm(grad_logits, head_VH_cast, out=grad_hidden_MH[rows])
            if grad_head_VH is not None:
                grad_head_VH += grad_logits.mT @ hidden_MH[rows]
        ctx.save_for_backward(grad_hidden_MH, grad_head_VH)
        ctx.head_dtype = head_VH.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MH, grad_head_VH = ctx.saved_tensors
        head = None if grad_head_VH is None else (grad_head_VH * grad).to(ctx.head_dtype)
        # In float32: 1 / count and the scale of a gradient scaler do not fit 16 bits.
        return (grad_hidden_MH * grad.float()).to(grad_hidden_MH.dtype), head, None, None, None
