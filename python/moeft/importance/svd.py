"""The largest singular directions of a matrix, exactly or through a random sketch.

Shapes: F outputs, K inputs, r rank, s columns of the sketch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_BELOW = 512
OVERSAMPLING = 16


class Truncated(NamedTuple):
    """``U diag(S) V^T``, the best approximation of a matrix of that rank or close to it.

    Attributes:
        u: ``[F, r]``, orthonormal columns; a column is zero where its singular value is.
        s: ``[r]``, descending.
        v: ``[K, r]``, like ``u``.
        residual: ``|D - U S V^T| / |D|`` in the Frobenius norm, 0 for a zero matrix.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    residual: float


def truncated_svd(d: Tensor, rank: int, generator: torch.Generator, power_iterations: int = 2) -> Truncated:
    """Find the ``rank`` largest singular directions.

    A matrix whose shorter side is at most 512, or not longer than the sketch, is decomposed exactly. Of others a random
    sketch of ``rank + 16`` columns finds the range; each power iteration multiplies the ratio of two singular values by
    itself twice, with a QR after every product so that small ones are not lost to rounding.

    Either way ``U`` projects ``D``, so ``|D - U S V^T|^2 = |D|^2 - |S|^2`` holds without approximation. Singular values
    are float32, so that a residual below 5e-4 is not told from zero.

    Args:
        d: ``[F, K]`` float32.
        rank: At most ``min(F, K)``.
        generator: Of the sketch, on the CPU.
        power_iterations: More come closer to the exact directions where singular values fall slowly.

    Source:
        Halko, Martinsson, Tropp, https://arxiv.org/abs/0909.4061, algorithm 4.4
    """
    columns = rank + OVERSAMPLING
    if min(d.shape) <= max(EXACT_BELOW, columns):
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
    else:
        q_Fs = _orthonormal(d @ torch.randn(d.shape[1], columns, generator=generator).to(d.device))
        for _ in range(power_iterations):
            q_Fs = _orthonormal(d @ _orthonormal(d.T @ q_Fs))
        u, s, vh = torch.linalg.svd(q_Fs.T @ d, full_matrices=False)
        u = q_Fs @ u
    u, s, v = u[:, :rank], s[:rank], vh[:rank].T
    # Directions of singular values that are rounding noise are arbitrary, and nothing is to be kept in them.
    real = s > s[0] * max(d.shape) * torch.finfo(d.dtype).eps
    whole, kept = (float(t.double().square().sum()) for t in (d, s[real]))
    residual = (max(whole - kept, 0.0) / whole) ** 0.5 if whole else 0.0
    return Truncated(u * real, s * real, v * real, residual)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
