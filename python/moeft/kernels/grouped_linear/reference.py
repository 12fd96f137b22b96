"""The definition of the grouped linear: one matmul per expert."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def grouped_linear(x_RK: Tensor, w_EFK: Tensor, offsets_E1: Tensor) -> Tensor:
    """Multiply each expert's block of rows by that expert's weight, ``[R, F]``."""
    bounds = offsets_E1.tolist()
    blocks = [x_RK[start:stop] @ w.mT for w, start, stop in zip(w_EFK, bounds[:-1], bounds[1:], strict=True)]
    return torch.cat(blocks)


def grouped_outer(g_RF: Tensor, x_RK: Tensor, offsets_E1: Tensor) -> Tensor:
    """Sum of outer products over each expert's rows, ``[E, F, K]``: the gradient of an expert's weight."""
    bounds = offsets_E1.tolist()
    return torch.stack([g_RF[a:b].mT @ x_RK[a:b] for a, b in itertools.pairwise(bounds)])
