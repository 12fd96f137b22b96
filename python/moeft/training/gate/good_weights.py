"""The trainable weights that last passed the gate, on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeft.errors import TrainingError


class GoodWeights:
    """Copies of a model's trainable parameters, replaced as a whole.

    Args:
        path: File to keep them in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, model: Any, step: int) -> None:
        """Keep the weights of a step; a kill leaves those of before."""
        tensors = {n: p.detach().contiguous().cpu() for n, p in model.named_parameters() if p.requires_grad}
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        save_file(tensors, temporary, metadata={"step": str(step)})
        os.replace(temporary, self.path)

    @torch.no_grad()
    def restore(self, model: Any) -> int:
        """Put them back, bit for bit; returns the step they are of.

        Raises:
            TrainingError: If there are none, or they are of another model.
        """
        if not self.path.is_file():
            raise TrainingError(f"there is no {self.path} to go back to; was the run folder cleaned?")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with safe_open(self.path, framework="pt") as file:
            if set(file.keys()) != trained.keys():
                raise TrainingError(f"{self.path} holds other weights than those that are trained; start a new run")
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(name))
            return int(file.metadata()["step"])
