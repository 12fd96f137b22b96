"""Routing on the CPU: permutation, inverse and offsets, beside a stable sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness import Case, Subject
from moeft.kernels import routing

TESTS = ("test_kernels_routing.py", "test_bucket_core.py")
EXPERTS, TOP_K = 128, 8


def cases() -> Iterator[Case]:
    """Few tokens and many."""
    for tokens in (512, 4096, 65536):
        index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
        flat = index.flatten()
        theirs = routing.reference.bucket(flat, EXPERTS)
        assert all(map(torch.equal, routing.bucket(index, EXPERTS), theirs))
        yield Case(
            f"routing, {tokens} tokens, {TOP_K} of {EXPERTS} experts",
            "rows/s",
            {
                "moeft": Subject(lambda index=index: routing.bucket(index, EXPERTS), flat.numel()),
                "torch, stable argsort": Subject(
                    lambda flat=flat: routing.reference.bucket(flat, EXPERTS), flat.numel()
                ),
            },
        )
