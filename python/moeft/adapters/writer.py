"""A safetensors file written one tensor at a time, so that memory holds one.

safetensors' own writer wants all tensors at once (safetensors issue 531).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Output:
    """One tensor to write."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write(path: Path, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
    """Write ``outputs``, each read when its turn comes; wide elements first, else in their order.

    Raises:
        ValueError: If a dtype is no floating one.
        OSError: If the file cannot be written.
    """
    import torch

    for output in outputs:
        if output.dtype not in _SIZES:
            raise ValueError(f"{output.name} is {output.dtype}, expected one of {', '.join(_SIZES)}")
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    outputs = sorted(outputs, key=lambda output: -_SIZES[output.dtype])
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for output in outputs:
        end = offset + prod(output.shape) * _SIZES[output.dtype]
        header[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for output in outputs:
            tensor = output.read().contiguous()
            assert tuple(tensor.shape) == output.shape, output.name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
