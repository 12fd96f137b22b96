"""Checkpoints on disk, through the Rust core: no torch, bounded memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.checkpoint.layout import LayoutReport, fuse_experts, unfuse_experts
from moeft.checkpoint.overwrite import check_tensors, overwrite_tensors
from moeft.progress_bar import byte_bar
from moeft.provenance.files import write_json

__all__ = [
    "LayoutReport",
    "QuantizeReport",
    "check_tensors",
    "fingerprint",
    "fuse_experts",
    "overwrite_tensors",
    "quantize",
    "read_report",
    "unfuse_experts",
]

REPORT_FILE = "quantize_report.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize` did. ``str()`` is a table.

    Attributes:
        out: The folder that was written.
        components: Component -> its bytes ``{"before", "after"}``.
        total: Bytes of all tensors, likewise.
        weights_packed: Linear layers and stacks of experts that were packed.
        tensors_copied: Tensors that were copied byte for byte.
        shards_resumed: Files that an interrupted run had finished.
        bytes_resumed: Bytes that it had written, those of finished files included.
        seconds: Wall time.
        base_fingerprint: Fingerprint of the source.
    """

    out: str
    components: dict[str, dict[str, int]]
    total: dict[str, int]
    weights_packed: int
    tensors_copied: int
    shards_resumed: int
    bytes_resumed: int
    seconds: float
    base_fingerprint: str

    def bytes_by_component(self, when: str) -> dict[str, int]:
        """Bytes of each component ``"before"`` or ``"after"``."""
        return {name: sizes[when] for name, sizes in self.components.items()}

    def __str__(self) -> str:
        lines = [f"{'component':<12}{'bytes before':>16}{'bytes after':>16}{'ratio':>8}"]
        for name, sizes in [*self.components.items(), ("total", self.total)]:
            if sizes["before"]:
                ratio = sizes["after"] / sizes["before"]
                lines.append(f"{name:<12}{sizes['before']:>16,}{sizes['after']:>16,}{ratio:>8.3f}")
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
    write_json(Path(out) / REPORT_FILE, report)
    return QuantizeReport(**report)


def read_report(folder: str | Path) -> QuantizeReport | None:
    """What :func:`quantize` left in a packed checkpoint; None if it left nothing, or other means packed it."""
    path = Path(folder) / REPORT_FILE
    return QuantizeReport(**json.loads(path.read_text("utf-8"))) if path.is_file() else None


def fingerprint(path: str | Path) -> str:
    """Identify the weights of a checkpoint folder from a sample of every tensor, whatever its shards."""
    return _core.fingerprint(str(path))
