"""Merge models and adapters into checkpoints: the Python face of the engine in the Rust core. No math here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.progress_bar import byte_bar

__all__ = ["MergeReport", "merge", "plan"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: The folder that was written.
        method: How weights were combined.
        tensors_merged: Tensors that were computed.
        tensors_copied: Tensors that were copied byte for byte.
        bytes: Bytes of all tensors written.
        shards_resumed: Files that an interrupted run had finished.
        bytes_resumed: Bytes that it had written, those of finished files included.
        seconds: Wall time.
        merged: Name of each computed tensor -> its largest absolute change (``max_delta``) and weight (``max_weight``),
            norm over that of the base (``norm_ratio``), ``cosine`` with the base, and ``branch`` where values decide.
        base_fingerprint: Fingerprint of the base.
        base_check: "verified" if every adapter bears this fingerprint, else "unverified"; "no_adapter" without one.
    """

    out: str
    method: str
    tensors_merged: int
    tensors_copied: int
    bytes: int
    shards_resumed: int
    bytes_resumed: int
    seconds: float
    merged: dict[str, dict[str, Any]]
    base_fingerprint: str
    base_check: str

    def __str__(self) -> str:
        base = "" if self.base_check == "no_adapter" else f" base {self.base_check};"
        return (
            f"{self.tensors_merged} tensors merged, {self.tensors_copied} copied, {self.bytes:,} bytes "
            f"in {self.seconds:.1f} s;{base} written to {self.out}"
        )


def merge(
    recipe: dict[str, Any] | str | Path,
    out: str | Path,
    progress: bool = True,
    *,
    folder: str | Path | None = None,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
) -> MergeReport:
    """Merge as a recipe says, in bounded memory.

    An interrupted merge leaves ``<out>.partial`` and continues from there; ``out`` appears when it is complete.

    Args:
        recipe: Keys as in ``docs/merging.md``, or the path of a YAML file with them. Relative paths in
            a file count from its folder, those in a dict from ``folder``.
        out: Folder to make; must not exist or be empty.
        progress: Draw a progress bar.
        folder: Where relative paths of a dict start; None takes the current folder.
        max_shard_bytes: Cut the output into files of at most this size; None keeps the files of the base.
        threads: Threads that read and compute; None takes all cores. The bytes do not depend on it.

    Raises:
        RecipeError: If the recipe has an unknown key or a value that cannot be used.
        AdapterError: If an adapter does not fit the base, in whole or in part, or the result would not be finite.
        CheckpointError: If a checkpoint is incomplete, damaged, not finite or of another architecture.
        OSError: If a file cannot be read or written, or the disk is too small.
    """
    text, start = _text(recipe, folder)
    with byte_bar("merge", progress) as callback:
        done = _core.merge_checkpoint(text, start, str(out), callback, max_shard_bytes, threads)
    return MergeReport(**json.loads(done))


def plan(recipe: dict[str, Any] | str | Path, *, max_shard_bytes: int | None = None) -> dict[str, Any]:
    """Open and check all inputs and say what :func:`merge` would do: tensors, files, bytes, memory.

    Args:
        recipe: As in :func:`merge`.
        max_shard_bytes: As in :func:`merge`.

    Raises:
        MoeftError: As :func:`merge`, before it writes.
    """
    text, folder = _text(recipe, None)
    planned: dict[str, Any] = json.loads(_core.plan_merge(text, folder, max_shard_bytes))
    return planned


def _text(recipe: dict[str, Any] | str | Path, folder: str | Path | None) -> tuple[str, str]:
    """A recipe as text, and the folder from which its relative paths count."""
    if isinstance(recipe, dict):
        return json.dumps(recipe, default=str), str(Path.cwd() if folder is None else folder)
    return Path(recipe).read_text("utf-8"), str(Path(recipe).absolute().parent)
