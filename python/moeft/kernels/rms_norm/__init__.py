"""Root-mean-square normalisation with a frozen weight.

Shapes: H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.dispatch import in_core
from moeft.kernels.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide every row by its root mean square, and multiply it by ``weight``.

    In float32 on the CPU the Rust core makes one pass forward and one backward, with the same bits on every instruction
    set and number of threads; otherwise PyTorch computes as ``reference.py`` says.

    Args:
        x: ``[..., H]``, floating.
        weight: ``[H]`` in the dtype of ``x``, frozen; or None for ones.
        eps: Added to the mean of squares.

    Returns:
        ``[..., H]`` in the dtype of ``x``.

    Raises:
        ValueError: If ``weight`` has another shape or dtype, or requires a gradient.

    Source:
        https://arxiv.org/abs/1910.07467
    """
    if weight is not None:
        if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
            raise ValueError(
                f"weight is {weight.dtype} of shape {tuple(weight.shape)}, expected {x.dtype} of {tuple(x.shape[-1:])}"
            )
        if weight.requires_grad:
            raise ValueError("weight requires a gradient, but this operation has none for it; freeze it")
    if x.dtype == torch.float32 and in_core(x) and x.numel():
        return cpu.RmsNorm.apply(x, weight, eps)
    return reference.rms_norm(x, weight, eps)
