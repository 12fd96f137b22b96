"""Linear layers of many experts at once, over rows sorted by expert.

Shapes: R rows, E experts, K inputs, F outputs.
"""

from __future__ import annotations

from torch import Tensor

from moeft.kernels.dispatch import in_core, in_triton
from moeft.kernels.grouped_linear import cpu, gpu, pytorch
from moeft.kernels.grouped_outer import gpu as outer_gpu
from moeft.kernels.nf4 import NF4Weight

__all__ = ["grouped_linear", "grouped_outer"]


def grouped_linear(x_RK: Tensor, weight: NF4Weight | Tensor, offsets_E1: Tensor, *, transpose: bool = False) -> Tensor:
    """Multiply each expert's block of rows by that expert's weight.

    On the CPU weights are restored in panels of 128 KiB; on a GPU in tiles inside the product, or into a buffer that
    all layers share; by PyTorch's operations a few experts at a time in at most 64 MiB.

    Args:
        x_RK: Rows sorted by expert. ``[R, F]`` with ``transpose``.
        weight: Packed or dense weights of E experts, each ``[F, K]`` as in ``nn.Linear``.
        offsets_E1: Start of each expert's block, then R; int32, on the device of ``x_RK``.
        transpose: Multiply by the weight itself instead of its transpose: the gradient with respect to the rows.

    Returns:
        ``[R, F]``, or ``[R, K]`` with ``transpose``, in the dtype of ``x_RK``. Products are summed in float32.

    Raises:
        ValueError: If shapes do not fit, or ``offsets_E1`` does not ascend from 0 to R (checked on the CPU only).

    Source:
        MegaBlocks, https://arxiv.org/abs/2211.15841
    """
    side = 1 if transpose else 2
    if x_RK.ndim != 2 or len(weight.shape) != 3 or x_RK.shape[1] != weight.shape[side]:
        raise ValueError(
            f"x has shape {tuple(x_RK.shape)} and the weight {tuple(weight.shape)}, "
            f"expected rows as wide as axis {side} of a stack of experts with 3 axes"
        )
    if in_core(x_RK):
        return cpu.grouped_linear(x_RK, weight, offsets_E1, transpose)
    if in_triton(x_RK):
        return gpu.grouped_linear(x_RK, weight, gpu.Tiles.of(offsets_E1, x_RK.shape[0]), transpose=transpose)
    return pytorch.grouped_linear(x_RK, weight, offsets_E1, transpose)


def grouped_outer(g_RF: Tensor, x_RK: Tensor, offsets_E1: Tensor) -> Tensor:
    """Sum the outer products of each expert's rows.

    Args:
        g_RF: Gradient rows sorted by expert.
        x_RK: Input rows sorted by expert, dtype of ``g_RF``.
        offsets_E1: Start of each expert's block, then R; int32.

    Returns:
        ``[E, F, K]``; zero for an expert without rows.
    """
    if in_triton(g_RF):
        return outer_gpu.grouped_outer(g_RF, x_RK, offsets_E1)
    return pytorch.grouped_outer(g_RF, x_RK, offsets_E1)
