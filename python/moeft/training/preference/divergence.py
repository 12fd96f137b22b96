"""Kullback-Leibler divergence of one policy from another, token by token, over the whole vocabulary.

Shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.integration.fused_loss import PlainHead

CHUNK_ELEMENTS = 1 << 24
"""Logits of a chunk, of both policies each: 64 MiB in float32."""


@torch.no_grad()
def token_divergences(policy_MH: Tensor, reference_MH: Tensor, head: PlainHead) -> Tensor:
    """``KL(policy || reference)`` at each token, in nats.

    Args:
        policy_MH: Last hidden states under the policy.
        reference_MH: Those under the reference.
        head: The head that both share.

    Returns:
        ``[M]`` float32.
    """
    rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    chunks = zip(policy_MH.split(rows), reference_MH.split(rows), strict=True)
    found = [_divergence(_log_probs(policy, head), _log_probs(reference, head)) for policy, reference in chunks]
    return torch.cat(found) if found else policy_MH.new_empty(0, dtype=torch.float32)


def _divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)


def _log_probs(hidden_CH: Tensor, head: PlainHead) -> Tensor:
    logits_CV = hidden_CH.float() @ head.weight.float().mT
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return torch.log_softmax(logits_CV, -1)
