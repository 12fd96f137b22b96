"""Steps that a number on the device makes void: the host need not know, when it launches them, whether they count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeft.training.optim.stochastic_adamw import StochasticAdamW


def reads_found_inf(optimizer: Any, device: torch.device) -> Any:
    """The optimiser, out of accelerate's wrapper, if 1 in its ``found_inf`` keeps a step from changing anything.

    ``found_inf`` is the name, and a float32 scalar on the device the form, in which ``torch.amp.GradScaler`` tells an
    optimiser. torch's fused Adam and AdamW read it in their kernel and take it off their step counts, which lie on the
    device; :class:`StochasticAdamW` puts back what it changed. Others count steps on the host (bitsandbytes, torch
    without ``fused``), work there (:class:`HostAdamW`), or keep state of an unknown kind.

    Args:
        optimizer: One of torch, or accelerate's wrapper of one.
        device: Where the number lies.

    Returns:
        None if the optimiser has to be told by having no gradients, or if a scaler tells it already.
    """
    if getattr(optimizer, "scaler", None) is not None:
        return None
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW):
        is_able = all(group["fused"] for group in inner.param_groups)
    else:
        is_able = isinstance(inner, StochasticAdamW)
    if not is_able:
        return None
    # The kernels take no plain scalar beside tensors that FSDP sharded, and the host would read it before it is there.
    trained = (p for group in inner.param_groups for p in group["params"])
    return inner if all(p.device.type == device.type and not hasattr(p, "to_local") for p in trained) else None


def nothing_if_void(change: Tensor, optimizer: Any) -> Tensor:
    """A change of weights that follows a step: zero if the step was void."""
    found_inf = getattr(getattr(optimizer, "optimizer", optimizer), "found_inf", None)
    if found_inf is None:
        return change
    is_void = found_inf.to(change.device) > 0
    return torch.where(is_void, torch.zeros_like(change), change)
