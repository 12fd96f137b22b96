"""Replace tensors of a checkpoint in place: same names, shapes and types, so that no header changes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft import _core
from moeft.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
HEADER_LENGTH_BYTES = 8


def overwrite_tensors(folder: str | Path, values: Mapping[str, Tensor]) -> list[str]:
    """Write values over tensors of a checkpoint folder, rounded to the type that each has there.

    Everything is checked before the first byte is written, and all is on the disk when this returns. A write that was
    cut off is finished by another call.

    Args:
        folder: Folder of a 16- or 32-bit checkpoint, to be changed.
        values: Name on disk -> new value.

    Returns:
        Names of the files that were changed.

    Raises:
        CheckpointError: If the checkpoint lacks a tensor, or has it in another shape or a type that is no float.
        OSError: If a file cannot be written.
    """
    import torch

    folder = Path(folder)
    listed = check_tensors(folder, values)
    files = sorted({listed[name]["file"] for name in values})
    for file in files:
        with (folder / file).open("r+b") as shard:
            header_bytes = int.from_bytes(shard.read(HEADER_LENGTH_BYTES), "little")
            header = json.loads(shard.read(header_bytes))
            for name, value in values.items():
                if listed[name]["file"] == file:
                    rounded = value.detach().to("cpu", getattr(torch, TYPES[listed[name]["dtype"]])).contiguous()
                    shard.seek(HEADER_LENGTH_BYTES + header_bytes + header[name]["data_offsets"][0])
                    shard.write(rounded.flatten().view(torch.uint8).numpy().data)
            shard.flush()
            os.fsync(shard.fileno())
    return files


def check_tensors(folder: str | Path, values: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Refuse a checkpoint whose tensors cannot be overwritten by these values.

    Returns:
        Name -> ``file``, ``shape`` and ``dtype`` of every tensor of the checkpoint.

    Raises:
        CheckpointError: As :func:`overwrite_tensors`.
    """
    listed = {tensor["name"]: tensor for tensor in json.loads(_core.tensors(str(folder)))}
    for name, value in values.items():
        if name not in listed:
            raise CheckpointError(f"{folder} holds no {name}, which was trained; is it the base of this run?")
        if list(value.shape) != listed[name]["shape"]:
            raise CheckpointError(f"{name} is {listed[name]['shape']} in {folder}, but {list(value.shape)} was trained")
        if listed[name]["dtype"] not in TYPES:
            raise CheckpointError(f"{name} is {listed[name]['dtype']} in {folder}, expected one of {', '.join(TYPES)}")
    return listed
