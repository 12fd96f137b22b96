"""The log-likelihood of one sequence, whose gradient the Fisher information is made of."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from moeft.errors import UnsupportedModelError
from moeft.integration.fused_loss import PlainHead, head_states, plain_head
from moeft.kernels.linear_cross_entropy import IGNORE_INDEX, linear_log_probs

Labels = Literal["data", "sampled", "generated"]
CHUNK_ROWS = 64


def log_likelihood(model: Any, row: dict[str, Any], labels: Labels, seed: int) -> Tensor:
    """Sum of the log-probabilities of the labels of one sequence.

    Args:
        model: A causal language model of transformers, without adapters.
        row: ``input_ids`` and ``labels``, lists of S tokens; -100 where a token does not count.
        labels: "data" takes the labels of the row, and so does "generated", which says that the model drew them.
            "sampled" draws a token from the model's own distribution at every place that counts, given the row's tokens
            before it.
        seed: Of the draw.

    Returns:
        Scalar, with a graph.

    Raises:
        ValueError: If ``labels`` is none of these.
        UnsupportedModelError: If the model's head is not a plain linear layer.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"labels is {labels!r}, expected one of {get_args(Labels)}")
    head = plain_head(model)
    if head is None:
        raise UnsupportedModelError(f"the head of {type(model).__name__} is no linear layer that moeft knows")
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([row["input_ids"]], device=device)
    hidden_SH = head_states(model, input_ids)[0, :-1]
    targets_S = torch.tensor(row["labels"][1:], device=hidden_SH.device)
    if labels == "sampled":
        targets_S = _sample(hidden_SH.detach(), head, targets_S, seed)
    return linear_log_probs(hidden_SH, head.weight, targets_S, head.softcap).sum()


@torch.no_grad()
def _sample(hidden_SH: Tensor, head: PlainHead, targets_S: Tensor, seed: int) -> Tensor:
    """A token for every place that counts, drawn on the host so that a device does not change the draw."""
    generator = torch.Generator().manual_seed(seed)
    sampled_S = targets_S.clone()
    for places in (targets_S != IGNORE_INDEX).nonzero().squeeze(-1).split(CHUNK_ROWS):
        logits = functional.linear(hidden_SH[places], head.weight).float()
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
        sampled_S[places] = drawn.to(sampled_S.device)
    return sampled_S
