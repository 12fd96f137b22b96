"""Move a model from the files of its checkpoint to a device, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moeft.integration.mapped_files import MappedFiles


def place(
    model: nn.Module,
    device: torch.device | str,
    files: Sequence[Path],
    move: Callable[[Tensor, torch.device], Tensor] = Tensor.to,
) -> None:
    """Move a model whose tensors are views of files; host memory holds one tensor and what a step of reading leaves.

    ``model.to`` would leave every page that it read in this process's memory for as long as one tensor stays a view.

    Args:
        model: As :func:`moeft.load` gives it without a device; experts that are streamed stay where they are.
        device: Where to.
        files: The checkpoint's files.
        move: Gives a tensor on the device, for a device that torch does not know.
    """
    device, read = torch.device(device), MappedFiles(files)

    def moved(tensor: Tensor) -> Tensor:
        found = move(tensor, device)
        read.count_read(tensor.nbytes)
        return found

    model._apply(moved)
    read.release()
