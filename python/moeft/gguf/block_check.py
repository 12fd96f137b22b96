"""The blocks of a GGUF file beside those that ggml's own quantisers make of the same values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeft.errors import CheckpointError, MissingExtraError

# As many values of a tensor are looked at, from its beginning, middle and end.
MAX_VALUES = 1 << 20


@dataclass(frozen=True)
class BlockCheck:
    """What was compared.

    Attributes:
        tensors: Their number.
        values: Values whose blocks were compared.
        different: Names of the tensors with another byte.
    """

    tensors: int
    values: int
    different: tuple[str, ...]


def check_blocks(
    headers: Mapping[Path, Sequence[Mapping[str, Any]]],
    exact: tuple[Path, Sequence[Mapping[str, Any]]],
    importance: Mapping[str, np.ndarray] | None = None,
) -> BlockCheck:
    """Quantise the values of one file with ggml and compare with the bytes of another.

    Args:
        headers: File -> its tensors, of the file to check or of its parts.
        exact: A file with all values in f32, and its tensors.
        importance: Name of a tensor -> weights of its columns ``[matrices, columns]``, where they were used.

    Raises:
        CheckpointError: If a tensor is not in the exact file, or has another shape there.
        MissingExtraError: If libgguf, which holds ggml's quantisers, is not installed.
    """
    try:
        import libgguf
    except ImportError as error:
        raise MissingExtraError('ggml\'s quantisers are not installed: pip install "moeft[gguf]"') from error
    known = {tensor["name"]: tensor for tensor in exact[1]}
    values = np.memmap(exact[0], np.uint8, "r")
    compared, different = 0, []
    for file, tensors in headers.items():
        blocks = np.memmap(file, np.uint8, "r")
        for tensor in tensors:
            name, shape = tensor["name"], tensor["shape"]
            if name not in known or known[name]["shape"] != shape:
                raise CheckpointError(f"{file} has {name} {shape}, but {exact[0]} does not; are both of one model?")
            kind = libgguf.GGMLQuantizationType[tensor["type"].upper()]
            rows = _matrix(blocks, tensor)
            floats = _matrix(values, known[name]).view(np.float32)
            weights = None if importance is None else importance.get(name)
            same = True
            for matrix, first, end in _runs(shape, floats.shape[0]):
                compared += (end - first) * floats.shape[1]
                weight = None if weights is None else weights[matrix]
                theirs = libgguf.quantize_rows(np.array(floats[first:end]), kind, weight)
                same &= np.array_equal(np.asarray(theirs).view(np.uint8).reshape(end - first, -1), rows[first:end])
            if not same:
                different.append(name)
    return BlockCheck(sum(map(len, headers.values())), compared, tuple(different))


def _matrix(data: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    """The bytes of a tensor, one row each; all axes but the last count rows."""
    rows = int(np.prod(tensor["shape"][:-1], dtype=np.int64))
    return data[tensor["offset"] : tensor["offset"] + tensor["bytes"]].reshape(rows, -1)


def _runs(shape: Sequence[int], rows: int) -> Iterator[tuple[int, int, int]]:
    """Matrix, first row and end of the runs of rows to look at; a run lies in one matrix."""
    per_matrix = shape[-2] if len(shape) > 1 else 1
    some = max(1, MAX_VALUES // 3 // shape[-1])
    starts = [(0, rows)] if rows * shape[-1] <= MAX_VALUES else [(s, some) for s in (0, rows // 2, rows - some)]
    for start, count in starts:
        first, end = start, min(start + count, rows)
        while first < end:
            matrix = first // per_matrix
            stop = min(end, (matrix + 1) * per_matrix)
            yield matrix, first, stop
            first = stop
