"""Log-probabilities of labels and their gradient on the CPU, by the Rust core.

Shapes: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft import _core


def log_probs_and_gradient(logits_CV: Tensor, targets_C: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, and their gradient with respect to the logits, which takes the logits' place.

    Args:
        logits_CV: float32, contiguous; overwritten.
        targets_C: int64, within the vocabulary.
        softcap: Soft cap of the logits, or None.
    """
    log_probs_C = logits_CV.new_empty(logits_CV.shape[0])
    targets = targets_C.contiguous().numpy()
    _core.log_probs_and_gradient(logits_CV.numpy(), targets, softcap, log_probs_C.numpy(), torch.get_num_threads())
    return log_probs_C, logits_CV
