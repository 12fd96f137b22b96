"""Log-probabilities of both answers of every pair of a batch, in one forward pass.

Shapes: B pairs, S tokens of a row, M compared tokens of an answer, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeft.data.example import IGNORE_INDEX
from moeft.integration.log_probs import hidden_states, linear_head
from moeft.integration.shared_prefix import prefix_masks
from moeft.kernels import linear_log_probs

Batch = Mapping[str, Any]
"""From :class:`moeft.data.pair_batches.PairCollator`, on the model's device."""


class PairScores(NamedTuple):
    """Of each pair, chosen then rejected."""

    sums: Tensor
    """``[B, 2]``, log-probabilities, summed over compared tokens, in nats; float32, or float64 for such a model."""
    counts: Tensor
    """``[B, 2]``, compared tokens."""


def score_pairs(model: Any, batch: Batch) -> PairScores:
    """Log-probabilities of both answers of each pair.

    Args:
        model: A causal language model with a linear head, with or without adapters.
        batch: Pairs in any layout.

    Raises:
        UnsupportedModelError: If the head is no linear layer.
    """
    return score_states(model, source_states(model, batch), batch)


def score_states(model: Any, states_B2MH: Tensor, batch: Batch) -> PairScores:
    """As :func:`score_pairs`, from the states that :func:`source_states` found."""
    head = linear_head(model)
    log_probs_B2M = linear_log_probs(states_B2MH, head.weight, batch["targets"], head.softcap)
    return PairScores(log_probs_B2M.sum(-1), count_targets(batch))


def count_targets(batch: Batch) -> Tensor:
    """``[B, 2]``, compared tokens of each answer."""
    return (batch["targets"] != IGNORE_INDEX).sum(-1)


def source_states(model: Any, batch: Batch) -> Tensor:
    """``[B, 2, M, H]``, the last hidden states from which compared tokens are predicted."""
    hidden = hidden_states(model, **_inputs(model, batch))
    sources_B2M = batch["sources"]
    states_TH = hidden.flatten(0, 1)
    num_pairs = len(sources_B2M)
    starts_B = torch.arange(num_pairs, device=states_TH.device) * (len(states_TH) // num_pairs)
    # Not gather: its index is as wide as the states, and backward keeps it, at 8 bytes an element.
    index = (sources_B2M + starts_B[:, None, None]).flatten()
    return states_TH.index_select(0, index).view(*sources_B2M.shape, -1)


def chosen_rows(states_B2MH: Tensor, batch: Batch) -> Tensor:
    """``[N, H]``, states before every compared token of the chosen answers of a batch."""
    return states_B2MH[:, 0][batch["targets"][:, 0] != IGNORE_INDEX]


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    ids, positions = batch["input_ids"], batch.get("position_ids")
    told = {"documents": [row for pair in batch["documents"] for row in pair]} if "documents" in batch else {}
    if positions is None:
        return {"input_ids": ids.flatten(0, 1), "attention_mask": batch["attention_mask"].flatten(0, 1), **told}
    inputs = {"input_ids": ids, "position_ids": positions, **told}
    if "segments" in batch:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs["attention_mask"] = prefix_masks(base, batch["segments"], positions)
    return inputs
