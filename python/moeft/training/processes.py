"""What processes of one run agree on, and the part of a tensor that this one holds. One process alone pays nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the tensor itself in a run of one. Every process must call it."""
    if world_size() == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def total_count(count: int, device: torch.device | str = "cpu") -> int:
    """Sum of a whole number over all processes. Every process must call it."""
    return count if world_size() == 1 else int(total(torch.tensor(count, device=device)))


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether a flag is set in any process, so that all decide alike. Every process must call it."""
    return bool(flag) if world_size() == 1 else bool(total(torch.tensor(float(flag), device=device)) > 0)


def local(tensor: Any) -> Tensor:
    """The part of a parameter or gradient that this process holds: all of it, unless FSDP2 or ZeRO-3 sharded it."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.detach()
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 gathered for the last forward, so that parameters are shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
