"""Experts of a checkpoint on disk: fused into stacks, or one tensor per expert and projection."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeft import _core
from moeft.progress_bar import byte_bar

__all__ = ["LayoutReport", "fuse_experts", "unfuse_experts"]


@dataclass(frozen=True)
class LayoutReport:
    """What a change of layout did.

    Attributes:
        out: The folder that was written.
        direction: ``"fuse"`` or ``"unfuse"``.
        layers: Decoder layers with experts.
        tensors_read: Tensors that were put together or taken apart.
        tensors_made: Tensors that were made of them.
        tensors_copied: Tensors that were copied byte for byte.
        bytes: Bytes of all tensors.
        shards_resumed: Files that an interrupted run had finished.
        bytes_resumed: Bytes that it had written, those of finished files included.
        seconds: Wall time.
    """

    out: str
    direction: str
    layers: int
    tensors_read: int
    tensors_made: int
    tensors_copied: int
    bytes: int
    shards_resumed: int
    bytes_resumed: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"experts of {self.layers} layers: {self.tensors_read} tensors -> {self.tensors_made}, "
            f"{self.tensors_copied} copied, {self.bytes:,} bytes in {self.seconds:.1f} s; written to {self.out}"
        )


def fuse_experts(source: str | Path, out: str | Path, *, progress: bool = False) -> LayoutReport:
    """Put the tensors of all experts into the stacks of their family, bit for bit and in bounded memory.

    Stacks are ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, transposed and interleaved where the family has
    them so. Everything else is copied byte for byte. An interrupted run leaves ``<out>.partial`` and continues from
    there; ``out`` appears at once, when it is complete.

    Args:
        source: Folder of a 16- or 32-bit checkpoint.
        out: Folder to make; must not exist or be empty.
        progress: Draw a progress bar.

    Raises:
        CheckpointError: If experts are missing, in both layouts, fused already, packed, or of shapes that do not agree.
        UnsupportedModelError: If the family is unknown.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
    return _convert(source, out, "fuse", progress)


def unfuse_experts(source: str | Path, out: str | Path, *, progress: bool = False) -> LayoutReport:
    """Take stacks apart: gate and up ``[I, H]`` and down ``[H, I]`` of every expert; else as :func:`fuse_experts`.

    Names are those of the family, or ``<experts>.<e>.{gate,up,down}_proj.weight`` where it has only stacks on disk.
    """
    return _convert(source, out, "unfuse", progress)


def _convert(source: str | Path, out: str | Path, direction: Literal["fuse", "unfuse"], progress: bool) -> LayoutReport:
    with byte_bar(direction, progress) as callback:
        return LayoutReport(**json.loads(_core.convert_layout(str(source), str(out), direction, callback)))
