"""Attention inside documents, one after the other: the definition, and what computes on the CPU.

T tokens, H heads of queries, G heads of keys and values, D and E widths of a head, L tokens of a document
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from moeft.kernels.document_attention.documents import Documents


def attend_documents(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    window: int | None,
    scale: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """As :func:`moeft.kernels.document_attention.attend_documents`, and with dropout of attention's weights."""
    heads = q_THD.shape[1]
    lengths = list(documents.lengths)
    rows = zip(*(x.split(lengths) for x in (q_THD, repeated(k_TGD, heads), repeated(v_TGE, heads))), strict=True)
    outputs = []
    for q_LHD, k_LHD, v_LHE in rows:
        length = len(q_LHD)
        near = None if window is None or window >= length else near_tokens(length, window, q_LHD.device)
        q_HLD, k_HLD, v_HLE = (x.transpose(0, 1)[None] for x in (q_LHD, k_LHD, v_LHE))
        out_HLE = F.scaled_dot_product_attention(
            q_HLD, k_HLD, v_HLE, near, dropout, is_causal=near is None, scale=scale
        )
        outputs.append(out_HLE[0].transpose(0, 1))
    return torch.cat(outputs)


def near_tokens(length: int, window: int, device: torch.device) -> Tensor:
    """``[L, L]`` bool: the keys that a query sees, itself and ``window - 1`` before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def repeated(x_TGD: Tensor, heads: int) -> Tensor:
    """``[T, H, D]``: each head of keys or values for all heads of queries that share it."""
    tokens, groups, width = x_TGD.shape
    if groups == heads:
        return x_TGD
    return x_TGD[:, :, None].expand(tokens, groups, heads // groups, width).reshape(tokens, heads, width)
