"""Log-probabilities of labels under a causal language model, without full logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeft.errors import UnsupportedModelError
from moeft.integration.fused_loss import PlainHead, head_states, plain_head
from moeft.kernels import linear_log_probs


def token_log_probs(model: Any, labels: Tensor, *, chunk_rows: int | None = None, **inputs: Any) -> Tensor:
    """Log-probability of each label, given the tokens before it.

    Differentiable, and a loss may weight the result afterwards: see :func:`moeft.kernels.linear_log_probs`.

    Args:
        model: A causal language model of transformers, with or without adapters.
        labels: ``[B, S]`` int64, not shifted; -100 for tokens that do not count.
        chunk_rows: Rows of logits in memory at a time.
        **inputs: ``input_ids``, ``attention_mask``, ``position_ids`` and other arguments of the model's forward.

    Returns:
        ``[B, S - 1]`` float32: entry ``t`` belongs to ``labels[:, t + 1]``; 0 where that is -100.

    Raises:
        UnsupportedModelError: If the model's head is not a plain linear layer.
    """
    head = linear_head(model)
    hidden = hidden_states(model, **inputs)
    labels = labels.to(hidden.device)[:, 1:]
    return linear_log_probs(hidden[:, :-1], head.weight, labels, head.softcap, chunk_rows)


def linear_head(model: Any) -> PlainHead:
    """The head of a model, which log-probabilities are computed with.

    Raises:
        UnsupportedModelError: If it is not a plain linear layer.
    """
    base = _base(model)
    head = plain_head(base)
    if head is None:
        raise UnsupportedModelError(
            f"the head of {type(base).__name__} is no linear layer without bias, or its logits are scaled in a way "
            "that moeft does not know; score its logits"
        )
    return head


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """``[B, S, H]``, what goes into the head, for arguments of the model's forward."""
    return head_states(_base(model), **inputs)


def edge_log_probs(
    model: Any, places: Tensor, labels: Tensor, *, chunk_rows: int | None = None, **inputs: Any
) -> Tensor:
    """Log-probability of labels after tokens at given places: a place may have several labels, as a tree's nodes do.

    Args:
        model: A causal language model of transformers, with or without adapters.
        places: ``[N]`` int64, places in ``input_ids`` taken as one row.
        labels: ``[N]`` int64, a label for each place.
        chunk_rows: Rows of logits in memory at a time.
        **inputs: As for :func:`token_log_probs`.

    Returns:
        ``[N]`` float32.

    Raises:
        UnsupportedModelError: If the model's head is not a plain linear layer.
    """
    head = linear_head(model)
    hidden = hidden_states(model, **inputs)
    hidden_NH = hidden.flatten(0, 1).index_select(0, places.to(hidden.device))
    return linear_log_probs(hidden_NH, head.weight, labels.to(hidden.device), head.softcap, chunk_rows)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
