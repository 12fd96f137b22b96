"""The definition: full logits, then log-softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100


def linear_log_probs(hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Log-probability of each row's label, float32 (float64 stays); 0 where the label is -100."""
    return -functional.cross_entropy(
        _logits(hidden, head_weight, softcap).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(labels.shape)


def linear_cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Sum of the cross-entropy over rows whose label is not -100."""
    return -linear_log_probs(hidden, head_weight, labels, softcap).sum()


def _logits(hidden: Tensor, head_weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ head_weight.to(hidden.dtype).mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
