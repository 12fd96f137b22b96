"""Weights of the model itself that train: whole on one process, saved alone, loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeft.errors import CheckpointError
from moeft.integration import model_family

FILE = "trained_weights.safetensors"
FORMAT = "moeft-trained-weights-v1"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the model itself that train, by their names without wrappers; those of adapters are left out."""
    return {
        model_family.name_in_base(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole trained weights in host memory, one at a time; to be called by every process of a sharded run."""
    return {name: whole(parameter) for name, parameter in trained_parameters(model).items()}


def whole(parameter: nn.Parameter) -> Tensor:
    """A parameter put together from the shards of all processes, in host memory."""
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.full_tensor().detach().cpu().contiguous()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu().contiguous()


def save(weights: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write weights into :data:`FILE` of a folder, which is made if it is missing."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path, {"format": FORMAT})
    return path


def load(model: nn.Module, folder: str | Path) -> None:
    """Put saved weights into the parameters of a model that train, whatever their number of shards then and now.

    Raises:
        CheckpointError: If the file is missing, or holds other weights than those that train.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {FILE}; was this checkpoint made with the same `train`?")
    saved, wanted = load_file(path), trained_parameters(model)
    if odd := sorted(saved.keys() ^ wanted.keys()):
        where = "the checkpoint" if odd[0] in saved else "the model"
        raise CheckpointError(f"{odd[0]} trains in {where} only; continue {path} with the `train` it was made with")
    for name, parameter in wanted.items():
        if saved[name].shape != _shape(parameter):
            raise CheckpointError(f"{name} is {list(saved[name].shape)} in {path}, {list(_shape(parameter))} here")
        _fill(parameter, saved[name])


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def _fill(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(value)
    else:
        parameter.copy_(value)
