"""Attention of packed rows on the CPU, forward and backward: document by document, beside a mask over all pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from harness import Case, Subject
from moeft.kernels.document_attention import Documents, attend_documents
from moeft.kernels.document_attention.reference import repeated
from pack_mask import visible

TESTS = ("test_kernels_document_attention.py",)
HEADS, GROUPS, WIDTH = 8, 2, 64
ROWS = {
    "2,048 tokens in 8 documents": [256] * 8,
    "2,048 tokens in 3 documents": [1400, 500, 148],
    "512 tokens in 40 documents": [13] * 39 + [5],
    "2,048 tokens in one document": [2048],
}


def cases() -> Iterator[Case]:
    """Packs of different documents, in both types."""
    for name, lengths in ROWS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for window in (None, 512):
                if window is None or window < max(lengths):
                    yield _case(name, lengths, dtype, window)


def _case(name: str, lengths: list[int], dtype: torch.dtype, window: int | None) -> Case:
    tokens = sum(lengths)
    leaves = [torch.randn(tokens, heads, WIDTH, dtype=dtype).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]
    documents, mask = Documents(lengths), visible(lengths, 1, window)[None]

    def inside() -> Tensor:
        return attend_documents(*leaves, documents, window=window)

    def masked() -> Tensor:
        q, k, v = (repeated(x, HEADS).transpose(0, 1)[None] for x in leaves)
        return F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)

    def both(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), leaves, leaves[0].detach())

    torch.testing.assert_close(inside(), masked(), rtol=0.02, atol=0.02)
    windowed = f", window {window}" if window else ""
    subjects = {"documents": Subject(both(inside), tokens), "mask": Subject(both(masked), tokens)}
    return Case(f"attention, {str(dtype).removeprefix('torch.')}, {name}{windowed}", "tokens/s", subjects)
