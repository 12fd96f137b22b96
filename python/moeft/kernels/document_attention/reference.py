"""Attention inside documents, one after the other: the definition, and what computes on the CPU.

T tokens, H heads of queries, G heads of keys and values, D and E widths of a head, L tokens of a document, P of a part
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from moeft.kernels.document_attention.documents import Documents

SMALLEST_PART = 128
"""Queries of a long document that are computed together, or as many as its window has."""


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
        near = min(window or len(q_LHD), len(q_LHD))
        part = max(near, SMALLEST_PART)
        for start in range(0, len(q_LHD), part):  # which sees its own tokens and a window before, no more
            first, end = max(0, start - near + 1), min(start + part, len(q_LHD))
            seen = None if end <= near else seen_in_window(start, first, end, near, q_LHD.device)
            q_HPD, k_HLD, v_HLE = (
                x.transpose(0, 1)[None] for x in (q_LHD[start:end], k_LHD[first:end], v_LHE[first:end])
            )
            out_HPE = F.scaled_dot_product_attention(
                q_HPD, k_HLD, v_HLE, seen, dropout, is_causal=seen is None, scale=scale
            )
            outputs.append(out_HPE[0].transpose(0, 1))
    return torch.cat(outputs)


def seen_in_window(start: int, first: int, end: int, window: int, device: torch.device) -> Tensor:
    """``[end - start, end - first]`` bool: which keys from ``first`` on the queries from ``start`` on see."""
    before = start - first
    seen = torch.ones(end - start, end - first, dtype=torch.bool, device=device)
    return seen.tril_(before).triu_(before - window + 1)


def repeated(x_TGD: Tensor, heads: int) -> Tensor:
    """``[T, H, D]``: each head of keys or values for all heads of queries that share it."""
    tokens, groups, width = x_TGD.shape
    if groups == heads:
        return x_TGD
    return x_TGD[:, :, None].expand(tokens, groups, heads // groups, width).reshape(tokens, heads, width)
