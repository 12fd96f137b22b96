"""Log-probabilities of labels and their gradient by PyTorch's operations.

Shapes: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LogProbsAndGradient:
    """Computes chunk after chunk in one more buffer of the logits' shape."""

    def __init__(self) -> None:
        self._probs: Tensor | None = None

    def __call__(self, logits_CV: Tensor, targets_C: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labels, and their gradient with respect to the logits, which are overwritten.

        The gradient is valid until the next call. Chunks must not grow.
        """
        if self._probs is None:
            self._probs = torch.empty_like(logits_CV)
        probs_CV, targets_C1 = self._probs[: logits_CV.shape[0]], targets_C[:, None]
        if softcap is not None:
            logits_CV.div_(softcap).tanh_().mul_(softcap)
        torch.softmax(logits_CV, -1, out=probs_CV)
        # The largest probability is 1 / sum(exp(logits - max)): no second pass of exponentials for the normaliser.
        log_z_C = logits_CV.amax(-1) - probs_CV.amax(-1).log()
        log_probs_C = logits_CV.gather(1, targets_C1).squeeze(1) - log_z_C
        grad_CV = probs_CV.neg_()
        grad_CV.scatter_add_(1, targets_C1, grad_CV.new_ones(targets_C1.shape))
        if softcap is not None:
            grad_CV.mul_(logits_CV.div_(softcap).square_().neg_().add_(1))
        return log_probs_C, grad_CV
