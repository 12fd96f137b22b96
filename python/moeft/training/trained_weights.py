"""Weights that train: put together from all processes, saved without the frozen ones, loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeft.errors import CheckpointError
from moeft.integration import model_family
from moeft.training.processes import reshard

FILE = "trained_weights.safetensors"
FORMAT = "moeft-trained-weights-v1"
ADAPTER_FILE = "adapter_model.safetensors"


def gather(model: nn.Module) -> dict[str, Tensor]:
    """All parameters that train, of adapters too, whole and in host memory; every process must call it."""
    reshard(model)
    return {name: _whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_base(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the model itself, by their names without PEFT's wrappers."""
    return {model_family.name_in_base(name): value for name, value in weights.items() if ".lora_" not in name}


def save(weights: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write weights into :data:`FILE` of a folder, which is made if it is missing."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path, {"format": FORMAT})
    return path


def load(model: nn.Module, folder: str | Path, adapters: bool = False) -> None:
    """Put saved weights into the parameters of a model that train, however many processes saved and load them.

    Args:
        model: The model.
        folder: Checkpoint with :data:`FILE`, PEFT's adapter or both.
        adapters: Whether to load the adapter ``default`` too.

    Raises:
        CheckpointError: If a file is missing, or holds other weights than those that train.
    """
    folder = Path(folder)
    wanted: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            wanted[model_family.name_in_base(name)] = parameter
        elif parameter.requires_grad and adapters:
            wanted[name.replace(".default.", ".")] = parameter
    files = [FILE] if any(".lora_" not in name for name in wanted) else []
    files += [ADAPTER_FILE] if any(".lora_" in name for name in wanted) else []
    saved: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}; was it saved by a run of the same recipe?")
        saved |= load_file(folder / file)
    if odd := sorted(saved.keys() ^ wanted.keys()):
        where = "checkpoint" if odd[0] in saved else "model"
        raise CheckpointError(
            f"{odd[0]} trains in the {where} only; continue {folder} with the recipe it was made with"
        )
    for name, parameter in wanted.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if saved[name].shape != shape:
            raise CheckpointError(f"{name} is {list(saved[name].shape)} in {folder}, but {list(shape)} in the model")
        _fill(parameter, saved[name])


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.full_tensor().detach().cpu().contiguous()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu().contiguous()


@torch.no_grad()
def _fill(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
