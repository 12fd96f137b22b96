"""The definition: full logits, then cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100


def linear_cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Sum of the cross-entropy over rows whose label is not -100, float32."""
    logits = (hidden @ head_weight.to(hidden.dtype).mT).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
