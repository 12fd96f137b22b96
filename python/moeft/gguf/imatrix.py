"""llama.cpp's importance matrix: how large the inputs of each weight's columns are, as a GGUF file.

Source: ``tools/imatrix`` of llama.cpp: ``NAME.in_sum2`` holds the sums of squared inputs, ``[matrices, columns]``, and
``NAME.counts`` how many inputs were added up, ``[matrices, 1]``; a stack of experts has one matrix per expert.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeft import _core
from moeft.errors import CheckpointError
from moeft.gguf.values import Metadata, array, string, uint32

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs of weights, under llama.cpp's names.

    Attributes:
        sums: Name -> sums of squares ``[matrices, columns]``, float32.
        counts: Name -> inputs of each matrix ``[matrices]``, float32.
        datasets: What was read.
        chunks: Sequences.
        chunk_size: Tokens of the longest sequence.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    datasets: Sequence[str] = ()
    chunks: int = 0
    chunk_size: int = 0

    def means(self) -> dict[str, np.ndarray]:
        """Name -> mean squares ``[matrices, columns]``; 1 for a matrix that no input reached, as llama.cpp has it."""
        return {
            name: np.where(count > 0, sums / np.maximum(count, 1), np.float32(1))
            for name, sums in self.sums.items()
            for count in [self.counts[name][:, None]]
        }

    def unreached(self) -> dict[str, int]:
        """Name -> matrices that no input reached, where there are any."""
        empty = {name: int((counts <= 0).sum()) for name, counts in self.counts.items()}
        return {name: count for name, count in empty.items() if count}


def write_imatrix(matrix: ImportanceMatrix, out: str | Path) -> None:
    """Write a file that ``llama-quantize --imatrix`` and ``moeft export gguf --imatrix`` read.

    Raises:
        CheckpointError: If the file exists.
        OSError: If it cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another name or remove it")
    metadata: Metadata = [
        ("general.type", string("imatrix")),
        ("imatrix.datasets", array("string", matrix.datasets)),
        ("imatrix.chunk_count", uint32(matrix.chunks)),
        ("imatrix.chunk_size", uint32(matrix.chunk_size)),
    ]
    tensors, data = [], []
    for name in sorted(matrix.sums):
        for suffix, values in ((COUNTS, matrix.counts[name][:, None]), (SUMS, matrix.sums[name])):
            tensors.append((name + suffix, values.shape))
            data.append(np.ascontiguousarray(values, "<f4").tobytes())
    header = bytes(_core.gguf_encode_header(json.dumps(metadata), json.dumps(tensors)))
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for block in data:
                file.write(block)
                file.write(bytes(-len(block) % 32))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read such a file, moeft's or llama.cpp's.

    Raises:
        CheckpointError: If it is damaged or no importance matrix.
    """
    header = json.loads(_core.gguf_header(str(path)))
    metadata = dict(header["metadata"])
    if metadata.get("general.type", {}).get("value") != "imatrix":
        raise CheckpointError(f"{path} is no importance matrix; `moeft imatrix` and llama-imatrix write one")
    data = np.memmap(path, np.uint8, "r")
    found: dict[str, np.ndarray] = {}
    for tensor in header["tensors"]:
        if tensor["type"] != "f32" or len(tensor["shape"]) > 2:
            raise CheckpointError(f"{path}: {tensor['name']} is {tensor['type']} {tensor['shape']}, expected f32 rows")
        flat = np.array(data[tensor["offset"] : tensor["offset"] + tensor["bytes"]]).view("<f4")
        found[tensor["name"]] = flat.reshape(-1, tensor["shape"][-1])
    sums = {name.removesuffix(SUMS): values for name, values in found.items() if name.endswith(SUMS)}
    counts = {name.removesuffix(COUNTS): values[:, 0] for name, values in found.items() if name.endswith(COUNTS)}
    wrong = [name for name in sums if name not in counts or len(counts[name]) != len(sums[name])]
    if wrong or not sums:
        raise CheckpointError(f"{path} has no counts that fit {wrong[0] if wrong else 'any tensor'}; write it again")
    bad = [name for name, values in sums.items() if not np.isfinite(values).all() or (values < 0).any()]
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} has sums of squares that are negative or not finite; write it again")
    datasets = metadata.get("imatrix.datasets", {"value": {"value": []}})["value"]["value"]
    chunks, size = (int(metadata.get(f"imatrix.{key}", {"value": 0})["value"]) for key in ("chunk_count", "chunk_size"))
    return ImportanceMatrix(sums, counts, datasets, chunks, size)
