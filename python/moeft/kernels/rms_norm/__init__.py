"""Root-mean-square normalisation, in the roundings that models are published with.

Shapes: H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.dispatch import in_core, in_triton
from moeft.kernels.rms_norm import cpu, gpu, reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, rounds_before_weight: bool = False
) -> Tensor:
    """Divide every row by its root mean square, and multiply it by ``weight + offset``.

    In float32 on the CPU the Rust core makes one pass forward and one backward where the weight is frozen, with the
    same bits on every instruction set and number of threads. On a GPU it is PyTorch's fused kernel, which keeps the
    rows as they are and one number of each. Otherwise PyTorch's operations compute as ``reference.py`` says.

    Args:
        x: ``[..., H]``, floating.
        weight: ``[H]`` in the dtype of ``x``; or None for ones.
        eps: Added to the mean of squares.
        offset: Added to the weight: Gemma 2 and 3 and Qwen 3.5 store it less one.
        rounds_before_weight: Whether rows of 16 bits are rounded to them before the weight, as Llama's are, and not
            after it alone, as Gemma's.

    Returns:
        ``[..., H]`` in the dtype of ``x``.

    Raises:
        ValueError: If ``weight`` has another shape or dtype.

    Source:
        https://arxiv.org/abs/1910.07467
    """
    if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype != x.dtype):
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}, expected {x.dtype} of {tuple(x.shape[-1:])}"
        )
    is_frozen = weight is None or not weight.requires_grad
    if x.dtype == torch.float32 and is_frozen and in_core(x) and x.numel():
        return cpu.RmsNorm.apply(x, weight + offset if weight is not None and offset else weight, eps)
    path = gpu if in_triton(x) else reference
    return path.rms_norm(x, weight, eps, offset, rounds_before_weight)
