"""How far a model has moved from what it was: KL(base || model) on texts, without a second model.

Of the base its last hidden states are remembered; the head makes its distributions of them again. A head that trains is
remembered too. S positions of a text, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeft.errors import DataError
from moeft.evaluation.turn_scores import evaluating
from moeft.integration.log_probs import hidden_states, linear_head
from moeft.integration.token_divergences import token_divergences


class BaseDivergence:
    """Remembers a model as it is now, and measures how far it has moved since.

    Args:
        model: A causal language model with a linear head, with or without adapters.
        texts: Token ids of each text.

    Raises:
        DataError: If there is no text.
        UnsupportedModelError: If the head is no linear layer.
    """

    def __init__(self, model: Any, texts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._texts = [list(text) for text in texts if len(text)]
        if not self._texts:
            raise DataError("no text to compare a model with its base on, expected at least one")
        self._base = list(self._hidden())
        head = linear_head(model)
        self._base_head = head._replace(weight=head.weight.detach().clone()) if head.weight.requires_grad else head

    def measure(self) -> NDArray[np.float64]:
        """``[n, 2]``: of each text the divergence summed over its positions, in nats, and their number."""
        head = linear_head(self._model)
        units = [
            (token_divergences(base_SH, self._base_head, now_SH, head).double().sum().item(), len(base_SH))
            for base_SH, now_SH in zip(self._base, self._hidden(), strict=True)
        ]
        return np.array(units)

    def _hidden(self) -> Iterator[Tensor]:
        """Last hidden states ``[S, H]`` of each text."""
        device = next(self._model.parameters()).device
        for text in self._texts:
            with evaluating(self._model), torch.no_grad():
                yield hidden_states(self._model, input_ids=torch.tensor([text], device=device))[0]
