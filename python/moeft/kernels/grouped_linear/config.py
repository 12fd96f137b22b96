"""How products of grouped rows are cut into tiles on a GPU, and whether a weight is restored inside the product."""

from __future__ import annotations

import functools
import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moeft.kernels import tuning
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.power_of_two import power_of_two

# Restored tile by tile inside the product; into a workspace, multiplied by our kernel; the same, by PyTorch's.
Path = Literal["fused", "workspace", "grouped_mm"]

WORKSPACE_VARIABLE = "MOEFT_WORKSPACE_MIB"
# Of a device's memory. Cards of 24 GiB then restore gate_up of gemma-4-26B in five parts, which are 197 MiB.
WORKSPACE_SHARE = 120
LEAST_WORKSPACE = 64 << 20
NARROW = 64  # outputs of a product with a rank
ALIGNMENT = 16  # bytes; torch.nn.functional.grouped_mm refuses other strides
A100 = (8, 0)
DATACENTER = (9, 10)  # Hopper and its successor; GeForce Blackwell is sm_120, with the matrix units of Ada


class Launch(NamedTuple):
    """Tile of outputs, inputs of a step, warps of a program and steps in flight."""

    n: int
    k: int
    warps: int
    stages: int


def rows_of_tile(rows: int, num_experts: int) -> int:
    """Rows of a tile: few enough that experts with few rows do not multiply zeros.

    At 32 rows per expert and a coefficient of variation of 0.7, tiles of 32 rows compute 1.5 times the rows, tiles of
    64 2.2 times.
    """
    mean = rows / max(1, num_experts)
    return next((size for size, most in ((16, 16), (32, 64), (64, 192)) if mean <= most), 128)


def launch_of(kind: str, m: int, outer: int, inner: int, x: Tensor) -> Launch:
    """The launch that was measured to be the fastest on this GPU, else a default that fits every one from sm_80 on.

    ``kind`` is "packed", "dense" or "gated", with "_transposed" for a product with the weight itself; ``x`` are rows.
    """
    if x.dtype == torch.float32:
        return tuning.lookup(f"{kind}-{m}x{outer}x{inner}-float32", x.device, candidates_of_float32(kind, m, outer))
    return tuning.lookup(f"{kind}-{m}x{outer}x{inner}", x.device, candidates(kind, m, outer))


def candidates_of_float32(kind: str, m: int, outer: int) -> tuple[Launch, ...]:
    """As :func:`candidates`, for rows that no matrix unit multiplies exactly: each thread holds its operands."""
    warps = 8 if m == 128 else 4
    if outer <= NARROW:
        return (Launch(max(16, power_of_two(outer)), 32, warps, 2),)
    n = 32 if kind.startswith("gated") else 64
    return Launch(n, 32, warps, 2), Launch(32, 16, warps, 3)


def candidates(kind: str, m: int, outer: int) -> tuple[Launch, ...]:
    """Launches to choose from. The first, the default, fits 99 KiB of shared memory without spills (tests say so)."""
    if outer <= NARROW:  # a rank: few outputs, so that a long step keeps memory busy
        n = max(16, power_of_two(outer))
        return Launch(n, 64, 4, 3), Launch(n, 128, 4, 2)
    warps = 8 if m == 128 else 4
    if kind.startswith("gated"):  # two tiles of outputs
        return Launch(64, 64, warps, 2), Launch(32, 64, warps, 3), Launch(64, 64, 8, 3)
    if kind == "packed_transposed":
        return Launch(64, 32, warps, 3), Launch(64, 64, warps, 2), Launch(128, 32, 8, 2)
    return Launch(128 if m <= 64 else 64, 64, warps, 3), Launch(64, 64, warps, 3), Launch(128, 64, 8, 2)


def path_of_weight(weight: NF4Weight | Tensor, rows: int, x: Tensor) -> Path:
    """How a stack meets ``rows`` rows of the dtype and on the device of ``x``.

    On GeForce cards decoding hides behind slower matrix units, so the product decodes; the A100 reads a restored weight
    faster once it serves more than 128 rows, sm_90 and sm_100 once it serves more than a tile. PyTorch's kernel needs
    the whole stack restored; on other GPUs it waits for the device. Float32 rows leave a product no registers to
    decode in.
    """
    datacenter = capability_of(x.device)[0] in DATACENTER
    by_pytorch = datacenter and fits_grouped_mm(weight, x.dtype)
    if not isinstance(weight, NF4Weight):
        return "grouped_mm" if by_pytorch else "workspace"
    if x.dtype == torch.float32:
        return "workspace"
    most_fused = 16 if datacenter else 128 if capability_of(x.device) == A100 else 256
    if rows <= most_fused * weight.shape[0]:
        return "fused"
    stack_bytes = weight.shape.numel() * x.element_size()
    return "grouped_mm" if by_pytorch and stack_bytes <= workspace_bytes(x.device) else "workspace"


def fits_grouped_mm(weight: NF4Weight | Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel takes rows of a dtype and a weight of such a shape, and is not slow for a rank."""
    return dtype == torch.bfloat16 and all(
        size > NARROW and size * dtype.itemsize % ALIGNMENT == 0 for size in weight.shape[1:]
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of the A100 where Triton's interpreter takes the place of a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else A100


@functools.cache
def workspace_bytes(device: torch.device) -> int:
    """Most bytes of the buffer for restored experts, which all layers share.

    A 120th of the device's memory (205 MiB of 24 GiB), or what ``MOEFT_WORKSPACE_MIB`` says.

    Raises:
        ValueError: If the variable is not a positive number.
    """
    given = os.environ.get(WORKSPACE_VARIABLE)
    if given:
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"{WORKSPACE_VARIABLE} is {given!r}, expected a positive number of mebibytes")
        return int(given) << 20
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return share_of(total)


def share_of(memory_bytes: int) -> int:
    """The workspace of a device with so much memory, bytes."""
    return max(LEAST_WORKSPACE, memory_bytes // WORKSPACE_SHARE)
