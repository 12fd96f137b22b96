"""Merge adapters into checkpoints: the Python face of the engine in the Rust core. No math here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.progress_bar import byte_bar

__all__ = ["MergeReport", "merge"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: The folder that was written.
        tensors_merged: Tensors that got a delta.
        tensors_copied: Tensors that were copied byte for byte.
        bytes: Bytes of all tensors written.
        shards_resumed: Files that an interrupted run had finished.
        seconds: Wall time.
        merged: Name of each merged tensor -> its largest absolute delta and weight.
        base_fingerprint: Fingerprint of the base.
        base_check: "verified" if every adapter bears this fingerprint, else "unverified".
    """

    out: str
    tensors_merged: int
    tensors_copied: int
    bytes: int
    shards_resumed: int
    seconds: float
    merged: dict[str, dict[str, float]]
    base_fingerprint: str
    base_check: str

    def __str__(self) -> str:
        return (
            f"{self.tensors_merged} tensors merged, {self.tensors_copied} copied, {self.bytes:,} bytes "
            f"in {self.seconds:.1f} s; base {self.base_check}; written to {self.out}"
        )


def merge(recipe: dict[str, Any] | str | Path, out: str | Path, progress: bool = True) -> MergeReport:
    """Merge as a recipe says, in bounded memory.

    An interrupted merge leaves ``<out>.partial`` and continues from there; ``out`` appears when it is complete.

    Args:
        recipe: Keys as in ``docs/recipes.md``, or the path of a YAML file with them. Relative paths in
            a file count from its folder, those in a dict from the current one.
        out: Folder to make; must not exist or be empty.
        progress: Draw a progress bar.

    Raises:
        RecipeError: If the recipe has an unknown key or a value that cannot be used.
        AdapterError: If an adapter does not fit the base, in whole or in part.
        CheckpointError: If a checkpoint is incomplete or damaged, or the result would not be finite.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
    if isinstance(recipe, dict):
        text, folder = json.dumps(recipe, default=str), Path.cwd()
    else:
        text, folder = Path(recipe).read_text("utf-8"), Path(recipe).absolute().parent
    with byte_bar("merge", progress) as callback:
        return MergeReport(**json.loads(_core.merge_checkpoint(text, str(folder), str(out), callback)))
