"""The grouped linear on a GPU: launches of the Triton kernel, or of PyTorch's, without waiting for the device.

Shapes: R rows, E experts, K inputs, F outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeft.kernels.grouped_linear import config
from moeft.kernels.grouped_linear.config import Path
from moeft.kernels.nf4 import NF4Weight
from moeft.kernels.nf4.gpu import PackedPointers, dequantize
from moeft.kernels.power_of_two import power_of_two

MAP_SIZE = 64  # tiles that a program of the tile map describes

_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Tiles(NamedTuple):
    """A static grid over rows of unknown distribution: which expert and which rows each program works on."""

    map: Tensor  # int32 [tiles, 2]: expert, first row; the expert E where there is nothing to do
    offsets: Tensor  # int32 [E + 1]
    m: int  # rows of a tile
    rows: int

    @classmethod
    def of(cls, offsets: Tensor, rows: int, m: int | None = None) -> Tiles:
        """Describe the tiles of E experts' rows on the device."""
        from moeft.kernels.grouped_linear import triton as kernels

        num_experts = offsets.numel() - 1
        m = m or config.rows_of_tile(rows, num_experts)
        number = -(-rows // m) + num_experts
        tiles = torch.empty(number, 2, dtype=torch.int32, device=offsets.device)
        kernels.tile_map_kernel[(-(-number // MAP_SIZE),)](
            offsets,
            tiles,
            number,
            E=num_experts,
            EP=power_of_two(num_experts),
            M=m,
            SIZE=MAP_SIZE,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return cls(tiles, offsets, m, rows)


class LowRank(NamedTuple):
    """What is added to a product: ``scaling * rows @ factor``."""

    rows: Tensor  # [R, r]
    factor: Tensor  # [E, F, r], or [E, r, K] beside a transposed product
    scaling: float


def grouped_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    tiles: Tiles,
    *,
    transpose: bool = False,
    permutation: Tensor | None = None,
    top_k: int = 1,
    low_rank: LowRank | None = None,
    path: Path | None = None,
) -> Tensor:
    """As :func:`moeft.kernels.grouped_linear.grouped_linear`, with rows gathered and a low-rank product added.

    Args:
        x: ``[R, K]``; with a ``permutation``, ``[R / top_k, K]`` tokens, of which row r is ``permutation[r] // top_k``.
        weight: ``[E, F, K]``, packed or dense.
        tiles: The tiles of the R rows.
        transpose: Multiply by the weight itself, ``[R, F]`` to ``[R, K]``.
        permutation: int64 ``[R]`` or None.
        top_k: Rows of a token.
        low_rank: What to add.
        path: How the weight is read, by default as :func:`config.path_of_weight` says.
    """
    num_experts, out_features, in_features = weight.shape
    shape = tiles.rows, in_features if transpose else out_features
    if not tiles.rows:
        return x.new_empty(shape)
    x = x.contiguous()
    path = path or config.path_of_weight(weight, tiles.rows, x)
    if path == "grouped_mm" and config.fits_grouped_mm(weight, x.dtype):
        dense = _dense(weight, 0, num_experts, x.dtype)
        y = _grouped_mm(x, dense, tiles, transpose, permutation, top_k)
        if low_rank is not None:
            _Call(x, y, tiles, transpose, permutation, top_k, low_rank).launch(
                "add", dense, (None,) * 6, 0, num_experts
            )
        return y
    call = _Call(x, x.new_empty(shape), tiles, transpose, permutation, top_k, low_rank)
    for first, stop, pointers in chunks(weight, path, x.dtype):
        call.launch("packed" if path == "fused" else "dense", weight, pointers, first, stop)
    return call.y


def chunks(
    weight: NF4Weight | Tensor, path: Path, dtype: torch.dtype
) -> Iterator[tuple[int, int, tuple[Tensor | None, ...]]]:
    """First expert, end, and pointers of the weight that a launch reads; with "fused" packed, else restored."""
    num_experts = weight.shape[0]
    if path == "fused" and isinstance(weight, NF4Weight):
        yield 0, num_experts, PackedPointers.of(weight)
        return
    chunk = num_experts
    if isinstance(weight, NF4Weight):
        stack_bytes = weight.shape.numel() * dtype.itemsize
        most = max(1, config.workspace_bytes(weight.device) * num_experts // stack_bytes)
        chunk = -(-num_experts // -(-num_experts // most))  # even ones: as few, and a smaller buffer
    for first in range(0, num_experts, chunk):
        stop = min(first + chunk, num_experts)
        yield first, stop, (_dense(weight, first, stop, dtype), None, None, None, None, None)


class _Call(NamedTuple):
    x: Tensor
    y: Tensor
    tiles: Tiles
    transpose: bool
    permutation: Tensor | None
    top_k: int
    low_rank: LowRank | None

    def launch(self, kind: str, weight: Any, pointers: tuple[Tensor | None, ...], first: int, stop: int) -> None:
        """Multiply the rows of the experts ``first`` to ``stop``; ``kind`` "add" adds the low-rank product alone."""
        from moeft.kernels.grouped_linear import triton as kernels

        _, rows, columns = weight.shape
        outer, inner = (columns, rows) if self.transpose else (rows, columns)
        tiles, low = self.tiles, self.low_rank
        measured = f"{kind}_transposed" if self.transpose else kind
        launch = config.launch_of(measured, tiles.m, outer, inner, self.x)
        rank = low.rows.shape[1] if low else 0
        kernels.grouped_linear_kernel[(tiles.map.shape[0] * -(-outer // launch.n),)](
            self.x,
            self.y,
            tiles.map,
            tiles.offsets,
            self.permutation,
            self.top_k,
            first,
            stop,
            *pointers,
            low.rows if low else None,
            low.factor if low else None,
            low.scaling if low else 0.0,
            ROWS=rows,
            COLUMNS=columns,
            BLOCK_SIZE=getattr(weight, "block_size", 64),
            TRANSPOSE=self.transpose,
            RANK=rank,
            RANKS=max(16, power_of_two(rank)),
            ADD=kind == "add",
            M=tiles.m,
            N=launch.n,
            K=launch.k,
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=False,
        )


def _dense(weight: NF4Weight | Tensor, first: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Weights of the experts from ``first`` up to ``stop``; those of a packed stack in the shared buffer."""
    if isinstance(weight, Tensor):
        return weight[first:stop].to(dtype).contiguous()
    shape = (stop - first, *weight.shape[1:])
    out = workspace(weight.device, dtype, math.prod(shape)).view(shape)
    dequantize(weight, out, first, stop)
    return out


def workspace(device: torch.device, dtype: torch.dtype, elements: int) -> Tensor:
    """A buffer that all layers share, at least as long; its values last until the next call."""
    buffer = _workspaces.get((device, dtype))
    if buffer is None or buffer.numel() < elements:
        _workspaces.pop((device, dtype), None)
        try:
            buffer = torch.empty(elements, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"no room for {elements * dtype.itemsize >> 20} MiB of restored experts; "
                f"set {config.WORKSPACE_VARIABLE} lower, to 64 for instance ({error})"
            ) from error
        _workspaces[device, dtype] = buffer
    return buffer[:elements]


def release_workspaces() -> None:
    """Give the shared buffers back to the allocator."""
    _workspaces.clear()


def _grouped_mm(
    x: Tensor, weight: Tensor, tiles: Tiles, transpose: bool, permutation: Tensor | None, top_k: int
) -> Tensor:
    if permutation is not None:
        x = x.index_select(0, permutation // top_k)
    return functional.grouped_mm(x, weight if transpose else weight.mT, offs=tiles.offsets[1:])
