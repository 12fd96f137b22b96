"""Causal attention of tokens to their own document, with or without a window.

T tokens, H heads of queries, G heads of keys and values, D and E widths of a head
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.kernels.document_attention import gpu, reference
from moeft.kernels.document_attention.documents import Documents

__all__ = ["Documents", "attend_documents"]


def attend_documents(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    documents: Documents,
    *,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend to the tokens before each token in its document; no pair of tokens that is masked is computed on a GPU.

    Args:
        q_THD: Queries.
        k_TGD: Keys; each of the G heads serves H / G heads of queries that follow each other.
        v_TGE: Values.
        documents: Where documents lie; together they are all T tokens.
        window: Tokens that a query sees at most, itself included; None for all before it.
        scale: Factor of the products of queries and keys; None for ``D ** -0.5``.
        dropout: Share of attention's weights that are dropped.

    Returns:
        ``[T, H, E]`` in the dtype of the queries. Products are of 16 bits with float32 sums for bfloat16 and float16.

    Raises:
        ValueError: If shapes do not fit each other, or the documents not the tokens.
    """
    _check(q_THD, k_TGD, v_TGE, documents, window)
    q_THD, k_TGD, v_TGE = (as_computed(x) for x in (q_THD, k_TGD, v_TGE))
    is_causal = window is None or window >= documents.longest
    if not dropout and gpu.has_kernel(q_THD, k_TGD, v_TGE, is_causal):
        return gpu.attend_documents(q_THD, k_TGD, v_TGE, documents, window, scale)
    return reference.attend_documents(q_THD, k_TGD, v_TGE, documents, window, scale, dropout)


def as_computed(x: Tensor) -> Tensor:
    """Rows in the type that autocast asks for, as ``scaled_dot_product_attention`` takes them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return x
    return x.to(torch.get_autocast_dtype(device))


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> None:
    tokens, heads, width = q.shape
    groups = k.shape[1]
    if k.shape != (tokens, groups, width) or v.shape[:2] != (tokens, groups) or heads % groups:
        raise ValueError(
            f"keys are {list(k.shape)} and values {list(v.shape)}, expected [{tokens}, G, {width}] and "
            f"[{tokens}, G, any], G a divisor of the {heads} heads of queries"
        )
    if documents.num_tokens != tokens:
        raise ValueError(f"documents have {documents.num_tokens} tokens, the queries {tokens}; give the padding too")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1: a token sees itself")
