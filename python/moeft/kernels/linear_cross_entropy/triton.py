"""Triton code of the loss head: logits to log-probabilities, and to their gradients in place."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)


@triton.jit
def capped(logits, softcap, SOFTCAP: tl.constexpr):
    """``softcap * tanh(logits / softcap)`` and the square of that tanh; without a cap the logits and 0."""
    if SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * (logits / softcap)) - 1
        return softcap * tanh, tanh * tanh
    else:  # noqa: RET505 - Triton allows a return in a branch only if the other returns too
        return logits, tl.zeros_like(logits)


@triton.jit
def log_probs_kernel(
    logits, labels, log_probs, coefficients, softcap, ignored,
    V: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Log-probability of a row's label; with ``GRADIENT`` the row of ``logits [C, V]`` becomes its gradient.

    The gradient is times the row's coefficient, if there are any. A row that is ignored gets 0 throughout, a label that
    is out of range NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != ignored
    valid = (label >= 0) & (label < V)
    logits += row * V
    # Before the reductions: behind them, a warp that is ahead may have written its gradient here.
    own, _own_square = capped(tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32), softcap, SOFTCAP)
    # Not -inf: lanes beyond the last column would subtract it from itself.
    largest = tl.full((SIZE,), LOWEST, tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, V, SIZE):
        column = start + tl.arange(0, SIZE)
        value, _ = capped(tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32), softcap, SOFTCAP)
        value = tl.where(column < V, value, LOWEST)
        larger = tl.maximum(largest, value)
        total = total * tl.exp(largest - larger) + tl.where(column < V, tl.exp(value - larger), 0.0)
        largest = larger
    top = tl.max(largest, 0)
    log_z = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    log_prob = own - log_z
    tl.store(log_probs + row, tl.where(counts, log_prob, 0.0))
    if GRADIENT:
        coefficient = tl.where(counts & (valid == 0), float("nan"), 1.0)
        if coefficients is not None:
            coefficient *= tl.load(coefficients + row)
        for start in range(0, V, SIZE):
            column = start + tl.arange(0, SIZE)
            mask = column < V
            value, square = capped(tl.load(logits + column, mask=mask, other=0.0).to(tl.float32), softcap, SOFTCAP)
            gradient = (tl.where(column == label, 1.0, 0.0) - tl.exp(value - log_z)) * (1 - square) * coefficient
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=mask)
