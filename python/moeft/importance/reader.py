"""Matrices of a 16- or 32-bit checkpoint, one at a time: a linear layer's weight, or that of one expert."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeft.errors import CheckpointError
from moeft.importance.disk import Disk, DiskWeight

DTYPES = ("F16", "BF16", "F32", "F64")


class MatrixReader:
    """Reads weights as ``[out, in]``, whichever way round they are stored.

    Args:
        disk: The checkpoint.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._open: dict[str, Any] = {}

    def shape(self, weight: DiskWeight) -> tuple[int | None, int, int]:
        """Experts of a stack or None, outputs, inputs.

        Raises:
            CheckpointError: If the weight is packed, or held in 8 bit, whose scales lie elsewhere.
        """
        if weight.tensors[0] not in self.disk.shapes:
            raise CheckpointError(f"{self.disk.path} holds {weight.name} in 4 bit; give the 16-bit checkpoint")
        dtype = self._file(weight.tensors[0]).get_slice(weight.tensors[0]).get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.disk.path} holds {weight.name} as {dtype}; give a 16- or 32-bit checkpoint")
        *experts, rows, columns = self.disk.shapes[weight.tensors[0]]
        if weight.experts is not None:
            return weight.experts, rows * (len(weight.tensors) // weight.experts), columns
        if not experts:
            return None, rows, columns
        return (experts[0], columns, rows) if self.disk.family.layout.transposed else (experts[0], rows, columns)

    def matrix(self, weight: DiskWeight, expert: int | None) -> Tensor:
        """The weight, or that of one expert of a stack, float32 ``[out, in]``."""
        if weight.experts is not None:
            assert expert is not None
            parts = len(weight.tensors) // weight.experts
            names = weight.tensors[expert * parts : (expert + 1) * parts]
            return torch.cat([self._file(name).get_tensor(name) for name in names]).float()
        name = weight.tensors[0]
        if expert is None:
            return self._file(name).get_tensor(name).float()
        stored = self._file(name).get_slice(name)[expert].float()
        return stored.T if self.disk.family.layout.transposed else stored

    def _file(self, tensor: str) -> Any:
        file = self.disk.files[tensor]
        if file not in self._open:
            self._open[file] = safe_open(self.disk.path / file, "pt")
        return self._open[file]
