"""Checkpoints on disk, through the Rust core: no torch, bounded memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.progress_bar import byte_bar

__all__ = ["QuantizeReport", "fingerprint", "quantize"]


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize` did. ``str()`` is a table."""

    bytes_before: dict[str, int]
    bytes_after: dict[str, int]
    seconds: float
    base_fingerprint: str

    def __str__(self) -> str:
        rows = [(name, before, self.bytes_after.get(name, 0)) for name, before in self.bytes_before.items() if before]
        rows.append(("total", sum(self.bytes_before.values()), sum(self.bytes_after.values())))
        lines = [f"{'component':<12}{'bytes before':>16}{'bytes after':>16}{'ratio':>8}"]
        lines += [f"{name:<12}{before:>16,}{after:>16,}{after / max(before, 1):>8.3f}" for name, before, after in rows]
        return "\n".join(lines)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    experts: bool = True,
    attention: bool = False,
    mlp: bool = False,
    double_quant: bool = False,
    block_size: int = 64,
    progress: bool = False,
) -> QuantizeReport:
    """Stream a 16- or 32-bit checkpoint to a packed NF4 checkpoint, in bounded memory.

    An interrupted run leaves ``<out>.partial`` and continues from there; ``out`` appears at once, when it is complete.

    Args:
        source: Folder of the checkpoint.
        out: Folder to make; must not exist or be empty.
        experts: Pack the stacks of experts.
        attention: Pack the projections of attention.
        mlp: Pack dense feed-forward layers.
        double_quant: Pack the statistics too.
        block_size: Elements that share one absmax.
        progress: Draw a progress bar.

    Raises:
        CheckpointError: If the checkpoint is incomplete, damaged, already packed, or holds values that are not finite.
        UnsupportedModelError: If its family is unknown.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
    options: dict[str, Any] = {
        "experts": experts,
        "attention": attention,
        "mlp": mlp,
        "double_quant": double_quant,
        "block_size": block_size,
    }
    with byte_bar("quantize", progress) as callback:
        report = json.loads(_core.quantize_checkpoint(str(source), str(out), json.dumps(options), callback))
    return QuantizeReport(**report)


def fingerprint(path: str | Path) -> str:
    """Identify the weights of a checkpoint folder from a sample of every tensor, whatever its shards."""
    return _core.fingerprint(str(path))
