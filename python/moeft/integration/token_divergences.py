"""Kullback-Leibler divergence of one model from another, token by token, over the whole vocabulary.

Shapes: M tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from moeft.integration.fused_loss import PlainHead
from moeft.kernels import linear_logits

CHUNK_ELEMENTS = 1 << 24
"""Logits of a chunk, of both models each: 64 MiB in float32."""


@torch.no_grad()
def token_divergences(p_MH: Tensor, p_head: PlainHead, q_MH: Tensor, q_head: PlainHead) -> Tensor:
    """``KL(p || q)`` at each token, in nats.

    Args:
        p_MH: Last hidden states under the model whose distributions weigh the differences.
        p_head: Its head.
        q_MH: Last hidden states of the same tokens under the other model, on the same device.
        q_head: The other's head, over the same vocabulary.

    Returns:
        ``[M]`` float32 (float64 for float64 states).
    """
    rows = max(1, CHUNK_ELEMENTS // p_head.weight.shape[0])
    chunks = zip(p_MH.split(rows), q_MH.split(rows), strict=True)
    return torch.cat(
        [
            kl_div(_log_probs(q, q_head), _log_probs(p, p_head), reduction="none", log_target=True).sum(-1)
            for p, q in chunks
        ]
    )


def _log_probs(hidden_CH: Tensor, head: PlainHead) -> Tensor:
    return linear_logits(hidden_CH, head.weight, head.softcap).log_softmax(-1)
