"""The definition of root-mean-square normalisation, gradient by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounds_before_weight: bool = False
) -> Tensor:
    """As :func:`moeft.kernels.rms_norm.rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None and rounds_before_weight:
        return normed.to(x.dtype) * (weight + offset if offset else weight)
    return (normed if weight is None else normed * (weight.to(normed.dtype) + offset)).to(x.dtype)
