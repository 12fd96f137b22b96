"""How far a model has moved from what it was: KL(base || model) on texts, without a second model.

Of the base its last hidden states are remembered; the head makes its distributions of them again. S positions of a
text, C of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeft.errors import DataError, UnsupportedModelError
from moeft.evaluation.turn_scores import evaluating
from moeft.integration.fused_loss import PlainHead
from moeft.integration.log_probs import hidden_states, linear_head
from moeft.kernels import linear_logits

CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time, twice: 64 MiB each


class BaseDivergence:
    """Remembers a model as it is now, and measures how far it has moved since.

    Args:
        model: A causal language model with a linear head that is frozen, with or without adapters.
        texts: Token ids of each text.

    Raises:
        DataError: If there is no text.
        UnsupportedModelError: If the head is trained, or is no linear layer.
    """

    def __init__(self, model: Any, texts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._texts = [list(text) for text in texts if len(text)]
        if not self._texts:
            raise DataError("no text to compare a model with its base on, expected at least one")
        self._base = [hidden_SH for hidden_SH, _ in self._hidden()]

    def measure(self) -> NDArray[np.float64]:
        """``[n, 2]``: of each text the divergence summed over its positions, in nats, and their number."""
        units = [
            (_divergence(base_SH, hidden_SH, head), len(base_SH))
            for base_SH, (hidden_SH, head) in zip(self._base, self._hidden(), strict=True)
        ]
        return np.array(units)

    def _hidden(self) -> Iterator[tuple[Tensor, PlainHead]]:
        """Last hidden states ``[S, H]`` of each text, and the head."""
        device = next(self._model.parameters()).device
        for text in self._texts:
            with evaluating(self._model), torch.no_grad():
                hidden = hidden_states(self._model, input_ids=torch.tensor([text], device=device))
            head = linear_head(self._model)
            if head.weight.requires_grad:
                raise UnsupportedModelError(
                    "the head is trained, so hidden states do not tell what the base said; freeze it, or watch the "
                    "perplexity of general texts instead"
                )
            yield hidden[0], head


@torch.no_grad()
def _divergence(base_SH: Tensor, hidden_SH: Tensor, head: PlainHead) -> float:
    rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    total = 0.0
    for base_CH, now_CH in zip(base_SH.split(rows), hidden_SH.split(rows), strict=True):
        base_CV, now_CV = (linear_logits(x, head.weight, head.softcap).log_softmax(-1) for x in (base_CH, now_CH))
        total += float(torch.nn.functional.kl_div(now_CV, base_CV, reduction="sum", log_target=True))
    return total
