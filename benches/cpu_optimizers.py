"""One AdamW step in host memory beside its peers; the limit is a copy of as many bytes as a step has to move.

A step may beat the copy, because it writes to memory that it has just read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from harness import Case, Subject
from moeft.training.optim import HostAdamW

TESTS = ("test_kernels_adamw.py", "test_host_adamw.py")
PARAMETERS = 100_000_000
RATE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# Bytes read and written per float32 parameter: weight, gradient and two moments, of which the gradient is only read.
BYTES = {32: 28, 8: 16}
COPY = "limit: torch copy of {} bytes per parameter"


def cases() -> Iterator[Case]:
    """State of 32 bits, then of 8."""
    yield _case(
        32,
        {
            "moeft": (HostAdamW, torch.float32),
            "torch, fused": (lambda p, **rate: torch.optim.AdamW(p, fused=True, **rate), torch.float32),
        },
    )
    yield _case(
        8,
        {
            "moeft": (lambda p, **rate: HostAdamW(p, state_bits=8, **rate), torch.float32),
            "moeft, bf16 with float32 master": (lambda p, **rate: HostAdamW(p, state_bits=8, **rate), torch.bfloat16),
            "bitsandbytes": (bitsandbytes.optim.AdamW8bit, torch.float32),
        },
        # bitsandbytes' CPU path takes 30 s for all of them.
        PARAMETERS // 10,
    )


def _case(bits: int, makers: dict[str, tuple[Callable[..., Any], torch.dtype]], count: int = PARAMETERS) -> Case:
    _compare([make for make, dtype in makers.values() if dtype == torch.float32])
    size = BYTES[bits] * count
    subjects = {}
    for name, (make, dtype) in makers.items():
        parameter = torch.nn.Parameter(torch.randn(count).to(dtype))
        parameter.grad = torch.randn(count).to(dtype)
        subjects[name] = Subject(make([parameter], **RATE).step, count, size, COPY.format(BYTES[bits]))
    source = torch.zeros(size // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    subjects[COPY.format(BYTES[bits])] = Subject(lambda: target.copy_(source), count, size)
    return Case(f"AdamW, {count:,} parameters, {bits}-bit state", "parameters/s", subjects)


def _compare(makers: list[Callable[..., Any]]) -> None:
    """After three steps the optimisers agree within rounding."""
    weights: list[Tensor] = []
    for make in makers:
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(100_000, generator=generator))
        optimizer = make([parameter], **RATE)
        for _ in range(3):
            parameter.grad = torch.randn(100_000, generator=generator)
            optimizer.step()
        weights.append(parameter.detach())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])
