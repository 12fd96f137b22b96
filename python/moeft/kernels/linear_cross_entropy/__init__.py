"""Cross-entropy and log-probabilities of a linear head without the logits of a whole batch in memory.

Shapes: N rows, H hidden, V vocabulary, M rows that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.dispatch import choice, in_triton
from moeft.kernels.linear_cross_entropy import gpu, reference
from moeft.kernels.linear_cross_entropy.function import LinearLogProbs, compute_dtype, write_logits
from moeft.kernels.linear_cross_entropy.reference import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "linear_cross_entropy", "linear_log_probs", "linear_logits"]

CHUNK_ELEMENTS = 1 << 25  # logits of a chunk: 128 MiB in float32, twice
MOST_CHUNK_ROWS = 1024


def linear_cross_entropy(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Sum of the cross-entropy of ``softcap * tanh(hidden @ head^T / softcap)`` over the rows that count.

    Minus the sum of :func:`linear_log_probs`, with its arguments, memory and errors.

    Returns:
        Scalar float32 (float64 for float64 rows); 0 when no row counts.
    """
    _check(hidden, head_weight, labels, softcap, chunk_rows)
    if choice() == "reference":
        return reference.linear_cross_entropy(hidden, head_weight, labels, softcap)
    if in_triton(hidden):
        return -_all_log_probs(hidden, head_weight, labels, softcap, chunk_rows).sum()
    return -_counted_log_probs(hidden, head_weight, labels, softcap, chunk_rows)[0].sum()


def linear_log_probs(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Log-probability of each row's label under ``softmax(softcap * tanh(hidden @ head^T / softcap))``.

    Rows whose label is -100 are skipped before the matmul, but not by Triton's kernels, which would have to wait for
    the device to know them. The others go through the head ``chunk_rows`` at a time. The gradient of ``hidden`` for a
    coefficient of one is formed in the same pass, so that no logits outlive a chunk and backward only scales. Kept for
    backward: that gradient, ``[M, H]`` in the dtype of ``hidden``. A head that requires a gradient gets one, for one
    more pass over the logits in backward.

    Args:
        hidden: ``[N, H]`` or any leading shape, last hidden states.
        head_weight: ``[V, H]``.
        labels: Class of each row, int64, already shifted; -100 for rows that do not count.
        softcap: Soft cap of the logits, or None.
        chunk_rows: Rows of logits in memory at a time, in two float32 buffers; by default as many as 32 Mi logits hold,
            and at most 1024. With Triton's kernels in one buffer of the rows' dtype, 128 Mi logits and 4096 rows.

    Returns:
        Float32 (float64 for float64 rows) in the shape of ``labels``; 0 where a row does not count.

    Raises:
        TypeError: If ``labels`` is not int64, or ``hidden`` or ``head_weight`` not floating.
        ValueError: If shapes do not fit, a label is out of range (with Triton's kernels its row is NaN instead), or
            ``softcap`` or ``chunk_rows`` is not positive.

    Source:
        Cut Cross-Entropy, https://arxiv.org/abs/2411.09009; the soft cap is that of Gemma 2 and later.
    """
    _check(hidden, head_weight, labels, softcap, chunk_rows)
    if choice() == "reference":
        return reference.linear_log_probs(hidden, head_weight, labels, softcap)
    if in_triton(hidden):
        return _all_log_probs(hidden, head_weight, labels, softcap, chunk_rows).view(labels.shape)
    counted_M, rows = _counted_log_probs(hidden, head_weight, labels, softcap, chunk_rows)
    return counted_M.new_zeros(labels.numel()).index_copy(0, rows, counted_M).view(labels.shape)


@torch.no_grad()
def linear_logits(hidden: Tensor, head_weight: Tensor, softcap: float | None = None) -> Tensor:
    """Logits of a few rows, all in memory at once and without a gradient; the caller decides how many.

    Args:
        hidden: ``[N, H]``, last hidden states.
        head_weight: ``[V, H]``.
        softcap: Soft cap of the logits, or None.

    Returns:
        ``[N, V]`` float32 (float64 for float64 rows).
    """
    logits = hidden.new_empty((hidden.shape[0], head_weight.shape[0]), dtype=compute_dtype(hidden))
    write_logits(hidden, head_weight, logits)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _counted_log_probs(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None, chunk_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the rows that count, and which rows these are."""
    labels_N = labels.reshape(-1)
    rows = (labels_N != IGNORE_INDEX).nonzero().squeeze(-1)
    targets_M = labels_N.index_select(0, rows)
    _check_range(targets_M, rows, head_weight.shape[0])
    hidden_MH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden_MH = hidden_MH.to(torch.get_autocast_dtype(device))
    chunk_rows = chunk_rows or max(1, min(MOST_CHUNK_ROWS, CHUNK_ELEMENTS // head_weight.shape[0]))
    with torch.autocast(device, enabled=False):
        log_probs_M = LinearLogProbs.apply(
            hidden_MH, head_weight, targets_M, softcap, chunk_rows, torch.is_grad_enabled()
        )
    return log_probs_M, rows


def _all_log_probs(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None, chunk_rows: int | None
) -> Tensor:
    """Log-probabilities of all rows, ``[N]``; which of them count stays on the device."""
    hidden_NH = hidden.reshape(-1, hidden.shape[-1])
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return gpu.LinearLogProbs.apply(
            hidden_NH, head_weight, labels.reshape(-1).contiguous(), softcap, chunk_rows, torch.is_grad_enabled()
        )


def _check(hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None, chunk_rows: int | None) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}, expected torch.int64; call labels.long()")
    for name, tensor in (("hidden", hidden), ("head_weight", head_weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected a floating-point type; is the head still packed?")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}")
    if head_weight.ndim != 2 or head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"head_weight has shape {tuple(head_weight.shape)}, expected (vocabulary, {hidden.shape[-1]}) to fit hidden"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number, or None for no cap")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")


def _check_range(targets_M: Tensor, rows: Tensor, vocabulary: int) -> None:
    wrong = ((targets_M < 0) | (targets_M >= vocabulary)).nonzero().squeeze(-1)
    if wrong.numel():
        first = int(wrong[0])
        raise ValueError(
            f"label {int(targets_M[first])} of row {int(rows[first])} is out of range, expected 0 to {vocabulary - 1}, "
            f"or {IGNORE_INDEX} for a row that does not count; {wrong.numel()} labels are out of range"
        )
